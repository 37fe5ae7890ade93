"""Clipped gradients in whole numbers, of bounded norm, one row per record."""

from __future__ import annotations

import math

from torch import Tensor

from fedlora_flwr.privacy.clipping import clip_factors, row_norms

_MARGIN = 1.0  # Units of the grid: more than all rounding errors of fp32 products together.


def rounded(rows: Tensor, clip_norm: float, norm: int) -> Tensor:
    """Clip each record's gradient, and round it to whole numbers of norm Δ at most.

    A record is first clipped to Δ - √D/2. Rounding to the nearest number moves each coordinate by
    at most a half, so it cannot take the record past Δ. The bound is then checked in exact
    arithmetic. A record beyond it, or with a gradient that is not finite, becomes zero entirely.

    Rounding is not stochastic. It has to be unbiased where a grid is coarse; this grid is fine: a
    whole record moves by at most √D/2, thousands of times less than the noise moves the sum.

    Parameters
    ----------
    rows : Tensor
        Gradients, fp32 or wider, shape (n, D). It is written to.
    clip_norm : float
        C, finite.
    norm : int
        Δ, at most 2²⁰.

    Returns
    -------
    Tensor
        Whole numbers in the type of ``rows``, shape (n, D), of L2 norm at most Δ by row.

    References
    ----------
    arXiv 2102.06387, section 4.1, rounds one vector per client, stochastically.

    Examples
    --------
    >>> import torch
    >>> rounded(torch.tensor([[3.0, 4.0], [0.0, float("inf")]]), clip_norm=1.0, norm=1024)
    tensor([[613., 818.],
            [  0.,   0.]])
    """
    room = norm - math.sqrt(rows.shape[1]) / 2 - _MARGIN
    if room <= 0:
        return rows.zero_()
    # A record of norm up to C·room/Δ is scaled by Δ/C, and a longer one to norm ``room``.
    factors = clip_factors(row_norms(rows), clip_norm * room / norm, rows.dtype)
    factors = factors.to(rows.device)
    rows.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    # Scale to norm 1 first: with a tiny clip norm, one factor for both steps would be infinite.
    rows.mul_(factors[:, None]).mul_(room).round_()
    # Squares of whole numbers up to 2²⁰ add up exactly in fp64, and their roots differ even for
    # 2⁴⁰ and 2⁴⁰ + 1.
    rows[(row_norms(rows) > norm).to(rows.device)] = 0.0
    return rows
