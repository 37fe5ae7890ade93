"""A check that a model treats each record on its own, as clipping record by record needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fedlora_flwr.data.records import Batch, Records, TensorRecords
from fedlora_flwr.errors import PrivacyViolation
from fedlora_flwr.lora.adapters import AdaptedModel
from fedlora_flwr.lora.precision import fp32_only
from fedlora_flwr.privacy.at_rest import RandomnessAtRest, same_randomness
from fedlora_flwr.privacy.stand_ins import stand_ins

Gradients: TypeAlias = Callable[[Records, Tensor, Sequence[str], slice], dict[str, Tensor]]

_LOOK_AT = 64  # At most so many records are tried to find two with a gradient.
_BATCH = 4  # Records in a pass in which all but one are exchanged.
_SEED = 20240229


def check_apart(
    adapted: AdaptedModel, gradients: Gradients, train: Callable[[], None], records: Records
) -> bool:
    """Check, in training mode, that a model treats each record on its own.

    A model that mixes records (a layer with time as its first axis, normalization over the batch,
    a router with a capacity, pictures that are blended) would give wrong per-record gradients
    without an error. This function checks three properties:

    - Without dropout, a record has the same gradient in a batch as alone, and its loss gives no
      gradient to the rows of other records.
    - With dropout and the same random numbers, a record keeps its gradient when all other records
      of its batch are exchanged for other records, for copies of itself or for extreme records.
    - Afterwards no buffer has changed, and the same pass gives the same gradients again.

    The records are drawn at random, so the outcome reveals nothing about private ones. Private
    records are used only where random records have no gradient or do not fit the task; then the
    second property is not checked.

    Parameters
    ----------
    adapted : AdaptedModel
        The model; afterwards it is in eval mode.
    gradients : callable
        `PrivateEngine.gradients_by_record`, or a function with the same arguments.
    train : callable
        Puts the model in training mode.
    records : Records
        The client's private records.

    Returns
    -------
    bool
        Whether two records with a gradient were found.

    Raises
    ------
    PrivacyViolation
        A record's gradient depends on other records, or the model keeps information about records.
    """
    names = list(adapted.parameters)
    buffers = buffers_of(adapted.model)
    before = states_of(buffers)
    kept = {place: tensor.clone() for place, (tensor, _) in before.items()}
    try:
        with _off_the_start(adapted), fp32_only(), torch.compiler.set_stance("force_eager"):
            train()
            drawn = _drawn_telling(gradients, records, names)
            telling = drawn or _telling(gradients, records, names)
            if len(telling) < 2:
                return False
            source = stand_ins(records, _LOOK_AT, _SEED) if drawn else records
            _check_alone(adapted, gradients, train, source, telling)
            if drawn:
                _check_exchanged(gradients, records, names)
            check_buffers(buffers, before)
    finally:
        _put_back(buffers, before, kept)
        adapted.model.eval()
    return True


def _drawn_telling(
    gradients: Gradients, records: Records, names: Sequence[str]
) -> dict[int, dict[str, Tensor]] | None:
    """Return `_telling` of records drawn at random, or None where these cannot be used."""
    try:
        found = _telling(gradients, stand_ins(records, _LOOK_AT, _SEED), names)
    except PrivacyViolation:
        raise
    except Exception:  # In a field of a user's own task, 0 and 1 may be invalid values.
        return None
    return found if len(found) == 2 else None


def _telling(
    gradients: Gradients, records: Records, names: Sequence[str]
) -> dict[int, dict[str, Tensor]]:
    """Return the gradients of the first two records that have one, by position, or of fewer."""
    telling: dict[int, dict[str, Tensor]] = {}
    for i in range(min(len(records), _LOOK_AT)):
        with RandomnessAtRest(), same_randomness(_SEED):
            alone = _alone(gradients, records, i, names)
        if any(gradient.any() for gradient in alone.values()):
            telling[i] = alone
        if len(telling) == 2:
            break
    return telling


def _alone(
    gradients: Gradients, records: Records, index: int, names: Sequence[str]
) -> dict[str, Tensor]:
    found = gradients(records, torch.tensor([index]), names, slice(None))
    return {name: _finite(found[name][0]) for name in names}


def _check_alone(
    adapted: AdaptedModel,
    gradients: Gradients,
    train: Callable[[], None],
    records: Records,
    telling: dict[int, dict[str, Tensor]],
) -> None:
    """Compare the gradients of two records, each alone, with their gradients in one batch."""
    names = list(adapted.parameters)
    if not _at_rest(gradients, records, telling, names):
        # A kernel draws random numbers that cannot be replaced. In eval mode it draws none.
        adapted.model.eval()
        telling = {i: _alone(gradients, records, i, names) for i in telling}
    # The batch holds each record twice, since a shuffle of only two records leaves both in place
    # half of the time.
    batch = torch.tensor(list(telling) * 2)
    for i, alone in enumerate(telling.values()):
        with RandomnessAtRest(), same_randomness(_SEED + i):
            found = gradients(records, batch, names, slice(i, i + 1))
        norms = {name: alone[name].norm() for name in names}
        # An array's gradient may be zero, as a query's is for a text of one token. Its entries are
        # then rounding errors, which this tolerance covers.
        rounding = 1e-3 * torch.stack(list(norms.values())).norm() + 1e-12
        for name in names:
            own, others = _finite(found[name][i]), found[name][torch.arange(len(batch)) != i]
            gap = (own - alone[name]).norm()
            if _finite(others).any() or gap > 0.02 * norms[name] + rounding:
                raise _mixes_records(name)
    train()


def _at_rest(
    gradients: Gradients,
    records: Records,
    telling: dict[int, dict[str, Tensor]],
    names: Sequence[str],
) -> bool:
    """Tell whether a record alone has the same gradient for another seed."""
    first, alone = next(iter(telling.items()))
    with RandomnessAtRest(), same_randomness(_SEED + 1):
        return _first_gap(_alone(gradients, records, first, names), alone) is None


def _check_exchanged(gradients: Gradients, records: Records, names: Sequence[str]) -> None:
    """Exchange all records of a batch but one, and check that this one keeps its gradient."""
    everything = torch.arange(_BATCH)

    def pass_of(batch: Batch) -> dict[str, Tensor]:
        with same_randomness(_SEED):
            return gradients(TensorRecords(batch), everything, names, slice(None))

    base = stand_ins(records, _BATCH, _SEED).batch(everything)
    before = pass_of(base)
    others = (
        (_BATCH - 1, stand_ins(records, _BATCH, _SEED + 1).batch(everything)),
        (_BATCH - 1, {name: t[-1:].expand_as(t) for name, t in base.items()}),
        (0, {name: t[:1].expand_as(t) for name, t in base.items()}),
        (1, stand_ins(records, _BATCH, _SEED + 2, extreme=True).batch(everything)),
    )
    for place, other in others:
        chosen = everything == place
        mixed = {
            name: torch.where(chosen.view(-1, *[1] * (t.ndim - 1)), base[name], t)
            for name, t in other.items()
        }
        after = pass_of(mixed)
        own = {name: _finite(before[name][place]) for name in names}
        if name := _first_gap({name: after[name][place] for name in names}, own):
            raise _mixes_records(name)
    again = pass_of(base)
    if name := _first_gap(again, {name: _finite(before[name]) for name in names}):
        raise PrivacyViolation(
            f"The gradient of {name!r} is not the same when a training pass is repeated with the "
            "same random numbers, so the model keeps something of the records that it has seen. "
            "Use a model that keeps no statistics."
        )


def _first_gap(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """Return the first array whose gradient differs by more than rounding errors, or None."""
    norms = {name: expected[name].norm() for name in expected}
    rounding = 1e-4 * torch.stack(list(norms.values())).norm() + 1e-12
    for name, before in expected.items():
        if (_finite(found[name]) - before).norm() > 1e-3 * norms[name] + rounding:
            return name
    return None


@contextmanager
def _off_the_start(adapted: AdaptedModel) -> Iterator[None]:
    """Move all arrays a little: where B is zero, the gradient of A is always zero as well."""
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


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Return the layers that mix the records of a batch in training mode.

    Raises
    ------
    PrivacyViolation
        An instance normalization keeps running statistics of records.
    """
    found: list[nn.Module] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            found.append(module)
        elif isinstance(module, nn.modules.instancenorm._InstanceNorm) and (
            module.track_running_stats
        ):
            raise PrivacyViolation(f"Layer {name!r} keeps statistics of private records.")
    return found


Place: TypeAlias = tuple[str, nn.Module, str]


def buffers_of(model: nn.Module) -> list[Place]:
    """Return where a model keeps its buffers: name, module and name in the module."""
    return [
        (f"{prefix}.{name}".lstrip("."), module, name)
        for prefix, module in model.named_modules()
        for name in module._buffers
    ]


def states_of(buffers: Sequence[Place]) -> dict[str, tuple[Tensor, int]]:
    """Return each buffer with its version, a number that every write increases."""
    found = {}
    for place, module, name in buffers:
        tensor = module._buffers[name]
        if tensor is not None:
            found[place] = (tensor, tensor._version)
    return found


def check_buffers(buffers: Sequence[Place], before: dict[str, tuple[Tensor, int]]) -> None:
    """Refuse a model whose buffers have been replaced or written to.

    Raises
    ------
    PrivacyViolation
        A buffer has changed. The message names it.
    """
    for place, module, name in buffers:
        tensor, (held, version) = module._buffers.get(name), before.get(place, (None, 0))
        if tensor is not held or (tensor is not None and tensor._version != version):
            raise PrivacyViolation(
                f"Buffer {place!r} changes in a training pass, so it would keep and reveal "
                "something of private records. Use a model that keeps no statistics."
            )


def _put_back(
    buffers: Sequence[Place], before: dict[str, tuple[Tensor, int]], kept: dict[str, Tensor]
) -> None:
    for place, module, name in buffers:
        if place in kept:
            held, version = before[place]
            if held._version != version:
                with torch.no_grad():
                    held.copy_(kept[place])
            module._buffers[name] = held


def _finite(gradient: Tensor) -> Tensor:
    return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _mixes_records(name: str) -> PrivacyViolation:
    return PrivacyViolation(
        f"The gradient of {name!r} for a record depends on the other records of its batch, so it "
        "cannot be clipped record by record. Look for layers that put time before the batch axis, "
        "that normalize over the batch, or that share one limit among all records of the batch."
    )
