"""Finding the place in a model up to which nothing trains, and leaving out what is before it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils import _pytree as pytree

from fedlora_flwr.lora.model_call import Call

# Modules before the cut must hold this share of the weights in linear layers and convolutions.
_WORTH = 0.05
_TRIED = 8  # places, from the last one on


class Template(NamedTuple):
    """What a module that is left out returns in place of its outputs, one entry per call."""

    module: nn.Module
    outputs: list[Any]
    rows: int

    def output(self, number: int, rows: int) -> Any:
        """Return the module's output number ``number`` for ``rows`` records: NaN everywhere."""

        def stand_in(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            size = (rows, *value.shape[1:]) if value.shape[:1] == (self.rows,) else value.shape
            return value.as_strided((), ()).expand(size)

        return pytree.tree_map(stand_in, self.outputs[number])


@dataclass(frozen=True, eq=False)
class Cut:
    """A place in a model.

    Parameters
    ----------
    place : str
        Name of the module in the model.
    module : nn.Module
        The module whose output the model continues from.
    left_out : tuple[nn.Module, ...]
        Modules that need not run.
    tensors : tuple[Tensor, ...]
        Parameters and buffers that the output depends on.
    order : tuple[int, ...]
        The output's axes in the order in which they lie in memory.
    templates : dict
        What stands in for the modules that are left out, by form of the call.
    like : dict
        One row of the output, by form of the call.
    """

    place: str
    module: nn.Module
    left_out: tuple[nn.Module, ...]
    tensors: tuple[Tensor, ...]
    order: tuple[int, ...]
    templates: dict[tuple[object, ...], list[Template]] = field(default_factory=dict)
    like: dict[tuple[object, ...], Tensor] = field(default_factory=dict)


class _Stop(Exception):
    """The first trained module begins, or the cut is reached."""


@dataclass(eq=False)
class _Record:
    """The modules of one call, up to the first that trains."""

    begun: list[nn.Module] = field(default_factory=list)
    ended: list[tuple[nn.Module, Any]] = field(default_factory=list)
    reached: bool = False


def find_cut(call: Call, starts: Iterable[nn.Module], trained: Sequence[Tensor]) -> Cut | None:
    """Find the last place at which nothing before it trains.

    Parameters
    ----------
    call : Call
        A call with at least five records.
    starts : Iterable[nn.Module]
        The modules that train.
    trained : Sequence[Tensor]
        Their parameters.

    Returns
    -------
    Cut or None
        ``None`` if random numbers are drawn before that place, if too little is before it, or if
        the model gives other bits when it continues from there.
    """
    with _unnoticed() as changed:
        found = _record(call, set(starts), trained)
        if not found.reached or changed():
            return None
        reference = cache(torch.no_grad()(call.run))  # Not needed where too little would be saved.
        tried, seen = 0, set[int]()
        places = {module: name for name, module in call.model.named_modules()}
        for number, (module, output) in reversed(list(enumerate(found.ended))):
            value = _main(output)
            if value is None or len(value) != call.rows or id(value) in seen:
                continue
            seen.add(id(value))
            if value.requires_grad:
                continue
            tried += 1
            for cut in _cuts(found, number, places.get(module, ""), value):
                if _is_worth(cut, call) and _same(cut, call, value, reference()):
                    return cut
            if tried == _TRIED:
                break
    return None


def prefix_of(call: Call, cut: Cut) -> tuple[Tensor, list[Template]]:
    """Return the output at a cut, with one row per record, and what stands in for other modules."""
    outputs: dict[nn.Module, list[Any]] = defaultdict(list)
    found: list[Tensor] = []

    def note(module: nn.Module, _: Any, output: Any) -> None:
        outputs[module].append(pytree.tree_map(_unknown, output))

    def stop(module: nn.Module, _: Any, output: Any) -> None:
        value = _main(output)
        assert value is not None
        found.append(value)
        note(module, _, output)
        raise _Stop

    with ExitStack() as stack, torch.inference_mode(False), torch.no_grad():
        for module in cut.left_out:
            stack.callback(module.register_forward_hook(note).remove)
        stack.callback(cut.module.register_forward_hook(stop).remove)
        with suppress(_Stop):
            call.run()
    replaced = (*cut.left_out, cut.module)
    return found[0], [Template(module, outputs[module], call.rows) for module in replaced]


@contextmanager
def standing_in(
    cut: Cut, value: Tensor, templates: Sequence[Template], rows: int
) -> Iterator[None]:
    """Let the model continue from ``value`` at a cut, and leave out what is before it.

    Sums depend on the order in memory, so ``value`` is laid out as the module's own output.
    """
    value = _laid_out(value, cut.order)

    def replace(template: Template) -> None:
        calls = iter(range(len(template.outputs)))

        def forward(*_: Any, **__: Any) -> Any:
            output = template.output(next(calls), rows)
            if template.module is not cut.module:
                return output
            return value if isinstance(output, Tensor) else (value, *output[1:])

        own = template.module.__dict__.get("forward")
        replaced.append((template.module, own))
        template.module.__dict__["forward"] = forward

    replaced: list[tuple[nn.Module, Any]] = []
    for template in templates:
        replace(template)
    try:
        yield
    finally:
        for module, own in replaced:
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


def _laid_out(value: Tensor, order: tuple[int, ...]) -> Tensor:
    if order == tuple(range(len(order))):
        return value.contiguous()
    found = torch.empty_permuted(value.shape, order, dtype=value.dtype, device=value.device)
    return found.copy_(value)


def _unknown(value: Any) -> Any:
    """Return a tensor of NaN, or of zeros where its type has no NaN, that takes no memory."""
    if not isinstance(value, Tensor):
        return value
    filling = float("nan") if value.is_floating_point() else 0
    return torch.full((), filling, dtype=value.dtype, device=value.device).expand(value.shape)


def _main(output: Any) -> Tensor | None:
    """Return a module's output if it is one tensor of floats, or begins with one."""
    first = output[0] if isinstance(output, tuple) and output else output
    others = output[1:] if isinstance(output, tuple) else ()
    if any(isinstance(value, Tensor) for value in pytree.tree_leaves(others)):
        return None
    good = isinstance(first, Tensor) and first.dim() > 1 and first.is_floating_point()
    return first if good else None


def _record(call: Call, starts: set[nn.Module], trained: Sequence[Tensor]) -> _Record:
    """Run a call up to the first module that trains."""
    found = _Record()

    def begin(module: nn.Module, _: Any) -> None:
        if module in starts:
            found.reached = True
            raise _Stop
        found.begun.append(module)

    def end(module: nn.Module, _: Any, output: Any) -> None:
        found.ended.append((module, output))

    with ExitStack() as stack, torch.inference_mode(False), torch.enable_grad():
        # A factor that does not train now may still be marked as a parameter that does.
        for parameter in {*call.model.parameters(), *trained}:
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        stack.callback(register_module_forward_pre_hook(begin).remove)
        stack.callback(register_module_forward_hook(end).remove)
        with suppress(_Stop):
            call.run()
    return found


def _cuts(found: _Record, number: int, place: str, value: Tensor) -> Iterator[Cut]:
    """Yield cuts after one module: first without all before it, then without its siblings only."""
    module, _ = found.ended[number]
    order = tuple(sorted(range(value.dim()), key=value.stride, reverse=True))
    before = [each for each, _ in found.ended[:number]]
    inside = set(module.modules())
    whole = [each for each in dict.fromkeys(before) if each not in inside]
    parts = {part for each in whole for part in each.modules() if part is not each}
    outermost = tuple(each for each in whole if each not in parts)
    tensors = _tensors(found, module)
    yield Cut(place, module, outermost, tensors, order)
    siblings = _siblings(found, module)
    near = tuple(each for each in outermost if each in siblings)
    if len(near) < len(outermost):
        yield Cut(place, module, near, tensors, order)


def _siblings(found: _Record, module: nn.Module) -> set[nn.Module]:
    """Return the modules beside one in a list or sequence of modules."""
    return {
        each
        for parent in found.begun
        for holder in parent.modules()
        if isinstance(holder, nn.ModuleList | nn.Sequential) and module in holder
        for each in holder
    }


def _tensors(found: _Record, module: nn.Module) -> tuple[Tensor, ...]:
    """Return the parameters and buffers of all modules that had begun when one ended."""
    held = {
        id(tensor): tensor
        for each in (*found.begun, *module.modules())
        for tensor in (*each.parameters(recurse=False), *each.buffers(recurse=False))
    }
    return tuple(held.values())


def _is_worth(cut: Cut, call: Call) -> bool:
    def weights(modules: Iterable[nn.Module]) -> int:
        layers = {part for module in modules for part in module.modules()}
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
        return sum(part.weight.numel() for part in layers if isinstance(part, kinds))

    return weights((cut.module, *cut.left_out)) >= _WORTH * weights([call.model])


def _same(cut: Cut, call: Call, value: Tensor, reference: Any) -> bool:
    """Tell whether the model gives the same bits from a cut, with any records beside a record."""
    try:
        fresh, templates = prefix_of(call, cut)
        part, _ = prefix_of(call.of(range(1, call.rows)), cut)
        if not _equal(fresh, value) or not _equal(part, fresh[1:]):
            return False
        dense = fresh.contiguous().clone()
        with standing_in(cut, dense, templates, call.rows), torch.no_grad():
            return _equal(call.run(), reference)
    except Exception:  # A model may do anything with outputs that are not numbers.
        return False


def _equal(found: Any, expected: Any) -> bool:
    ours, theirs = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(ours, theirs, strict=True)
    )


@contextmanager
def _unnoticed() -> Iterator[Any]:
    """Put torch's generators back afterward, and tell whether random numbers were drawn."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]

    before = states()
    try:
        yield lambda: not _equal(states(), before)
    finally:
        torch.set_rng_state(before[0])
        for device, state in zip(devices, before[1:], strict=True):
            torch.cuda.set_rng_state(state, device)
