"""Whether a model treats each record on its own, as clipping record by record needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from fedlora_flwr.adapters import AdaptedModel
from fedlora_flwr.errors import PrivacyViolation
from fedlora_flwr.precision import fp32_only
from fedlora_flwr.tasks.registry import Records

Gradients: TypeAlias = Callable[[Records, Tensor, Sequence[str], slice], dict[str, Tensor]]

_LOOK_AT = 64  # records at most, in search of two that have a gradient


def check_apart(adapted: AdaptedModel, gradients: Gradients, records: Records) -> bool:
    """Check on two records that the model treats each on its own.

    A model that mixes records (a layer with time as its first axis, normalisation over the batch)
    would give wrong per-record gradients without an error. The outcome depends on the model's
    structure, not on the values of the records. The two are the first that have a gradient at all:
    a record without an answer has none, and shows nothing.

    Parameters
    ----------
    adapted : AdaptedModel
        The model; it is in eval mode after.
    gradients : callable
        As `PrivateEngine.gradients_by_record`.
    records : Records
        The client's private records.

    Returns
    -------
    bool
        Whether two such records were found.

    Raises
    ------
    PrivacyViolation
        In a batch of two, a record's gradient differs from the one it has alone, or its loss has a
        gradient in the other's rows.
    """
    names = list(adapted.parameters)
    adapted.model.eval()
    with _off_the_start(adapted), fp32_only():
        telling = _telling(gradients, records, names)
        if len(telling) < 2:
            return False
        both = torch.tensor(list(telling))
        for i, alone in enumerate(telling.values()):
            pair = gradients(records, both, names, slice(i, i + 1))
            norms = {name: alone[name].norm() for name in names}
            # Of arrays whose gradient is zero, as a query's of a text of one token, what is seen
            # is rounding.
            rounding = 1e-3 * torch.stack(list(norms.values())).norm() + 1e-12
            for name in names:
                own, other = _finite(pair[name][i]), _finite(pair[name][1 - i])
                gap = (own - alone[name]).norm()
                if other.any() or gap > 0.02 * norms[name] + rounding:
                    raise _mixes_records(name)
    return True


def _telling(
    gradients: Gradients, records: Records, names: Sequence[str]
) -> dict[int, dict[str, Tensor]]:
    """Return the first two records with a gradient, and it; fewer where none is found soon."""
    telling: dict[int, dict[str, Tensor]] = {}
    for i in range(min(len(records), _LOOK_AT)):
        found = gradients(records, torch.tensor([i]), names, slice(None))
        alone = {name: _finite(found[name][0]) for name in names}
        if any(gradient.any() for gradient in alone.values()):
            telling[i] = alone
        if len(telling) == 2:
            break
    return telling


@contextmanager
def _off_the_start(adapted: AdaptedModel) -> Iterator[None]:
    """Move all arrays a little: where B is zero, so is the gradient of A, and shows nothing."""
    start = {name: p.detach().clone() for name, p in adapted.parameters.items()}
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for p in adapted.parameters.values():
                p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.02)
        yield
    finally:
        with torch.no_grad():
            for name, p in adapted.parameters.items():
                p.copy_(start[name])


def _finite(gradient: Tensor) -> Tensor:
    return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _mixes_records(name: str) -> PrivacyViolation:
    return PrivacyViolation(
        f"The gradient of {name!r} for a record depends on the other records of its batch, so it "
        "cannot be clipped record by record. Look for layers that put time before the batch axis "
        "or that normalise over the batch."
    )
