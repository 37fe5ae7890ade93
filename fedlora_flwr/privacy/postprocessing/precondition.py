"""Preconditioning of the privatized gradient of a LoRA factor by the factor that is frozen."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.plan import A, B


def precondition(grad: Tensor, other: Tensor, factor: str, scaling: float, ridge: float) -> Tensor:
    """Turn a factor's gradient into the step that best follows the gradient of the full weight.

    A move of B by X moves the weight by ``s·X·A``. This is nearest to the weight's gradient at
    ``X = s⁻² grad (A·Aᵀ)⁻¹``. The same holds for A (LA-LoRA, arXiv 2602.19926, Theorem 2). A ridge
    ρ adds ``s²·ρ·‖X‖²`` to the distance that is minimized.

    This is post-processing and costs no privacy: the result depends only on the privatized
    gradient, on public constants, and on the frozen factor, which earlier releases and private
    steps have produced. It does amplify noise in directions in which the frozen factor is small.

    Parameters
    ----------
    grad : Tensor
        Privatized gradient: (m, r) for B, (r, n) for A. It is not written to.
    other : Tensor
        The frozen factor: A, (r, n), for the gradient of B; B, (m, r), for that of A. It is not
        written to.
    factor : str
        Whose gradient it is, ``"A"`` or ``"B"``.
    scaling : float
        The adapter's scaling s, not 0.
    ridge : float
        Added to the diagonal of the frozen factor's Gram matrix, at least 0.

    Returns
    -------
    Tensor
        Shape and type of ``grad``; computed in fp32 at least.

    Raises
    ------
    InvalidValue
        The factor is unknown, the ridge is negative, or the Gram matrix with the ridge is singular
        in the precision of the computation. The last is the case for B = 0, its start, without a
        ridge.
    """
    if factor not in (A, B):
        raise InvalidValue("factor", factor, f"{A!r} or {B!r}")
    if not ridge >= 0:
        raise InvalidValue("ridge", ridge, "a number of at least 0")
    wide = torch.promote_types(torch.promote_types(grad.dtype, other.dtype), torch.float32)
    rows, frozen = grad.detach().to(wide), other.detach().to(wide)
    if factor == A:
        frozen = frozen.t()
    else:
        rows = rows.t()
    root = _cholesky(frozen @ frozen.t(), ridge)
    solved = torch.cholesky_solve(rows, root) / scaling**2
    return (solved if factor == A else solved.t()).to(grad.dtype).contiguous()


def _cholesky(gram: Tensor, ridge: float) -> Tensor:
    gram.diagonal().add_(ridge)
    if not _regular(gram):
        raise InvalidValue(
            "ridge", ridge, "a larger number, because the frozen factor's Gram matrix is singular"
        )
    root: Tensor = torch.linalg.cholesky(gram)
    return root


def _regular(gram: Tensor) -> bool:
    """Tell whether the matrix is regular beyond the rounding error.

    Rounding turns zero eigenvalues into small positive or negative ones, so a Cholesky
    decomposition of a singular matrix often succeeds. The matrix is first scaled to a unit
    diagonal, because ranks of unequal size do not make it singular.
    """
    size = gram.diagonal().sqrt()
    if not (size.isfinite() & (size > 0)).all():
        return False
    smallest = torch.linalg.eigvalsh(gram / torch.outer(size, size)).min()
    return bool(smallest > 8 * len(gram) * torch.finfo(gram.dtype).eps)
