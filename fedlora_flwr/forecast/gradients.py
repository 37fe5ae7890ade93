"""What joint clipping leaves of the gradients of A, B and head, before a run starts.

Whoever reads a plan may learn what these norms tell, and the norms of private gradients would be
outside every promise. So no private record is read here: only public ones, or random inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedlora_flwr.config import RunConfig
from fedlora_flwr.data.hub import own_copies_only
from fedlora_flwr.data.records import Records, TensorRecords
from fedlora_flwr.errors import FedLoRAError, InvalidValue, explained
from fedlora_flwr.forecast.forecast import Forecast, skeleton
from fedlora_flwr.layout import Layout, by_part, part_of
from fedlora_flwr.lora.adapters import AdaptedModel
from fedlora_flwr.lora.build import build_adapted, resolve_device
from fedlora_flwr.lora.seeded import seeded
from fedlora_flwr.lora.started import start_of
from fedlora_flwr.plan import HEAD, PARTS, A, ComponentPlan
from fedlora_flwr.privacy.clip_weights import EVEN, ClipWeights
from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.privacy.stand_ins import stand_ins
from fedlora_flwr.server.noise import noisy_coordinates
from fedlora_flwr.server.rehearsal import build_unread, is_large
from fedlora_flwr.server.strategy import build_strategy
from fedlora_flwr.tasks.registry import Task, check_splits_apart, optional

LEAST = 0.1
"""The share of the clip norm below which a part of the model gets a warning."""
_MOST_RECORDS, _FEWEST_RECORDS = 64, 4
# Records times parameters: a pass takes some seconds on one core.
_WORK = 500_000_000
_APART = "rolora"
_LOOK = "The run itself does not need this figure."
Squares = Mapping[str, Tensor]
"""Squared norms of each record's gradient by array, fp64, shape (records,)."""


@dataclass(frozen=True)
class Group:
    """One part of the model in steps of one kind.

    Parameters
    ----------
    part : str
        ``"A"``, ``"B"`` or ``"head"``.
    norm : float
        Norm of a record's gradient in this part before clipping, mean over the records.
    share : float or None
        Norm of what clipping leaves of it over the clip norm C, mean over the records; ``None``
        without clipping.
    noise_to_signal : float or None
        Norm of the noise of a round's mean in this part over the largest norm that the mean's
        clipped gradients can have there; ``None`` without noise or without a gradient.
    """

    part: str
    norm: float
    share: float | None
    noise_to_signal: float | None

    def __str__(self) -> str:
        """Say it in a few words."""
        parts = [] if self.share is None else [f"{self.share:.0%} of C"]
        if self.noise_to_signal is not None:
            parts.append(f"noise {self.noise_to_signal:.2g} × signal")
        return f"{self.part} {self.norm:.2g}" + (f" ({', '.join(parts)})" if parts else "")


@dataclass(frozen=True)
class Mode:
    """Steps that train the same parts.

    Parameters
    ----------
    joint : float
        Norm of a record's gradient over all parts together, mean over the records.
    groups : list[Group]
        The parts that train.
    """

    joint: float
    groups: list[Group]

    @property
    def name(self) -> str:
        """The parts, e.g. ``"B + head"``."""
        return " + ".join(group.part for group in self.groups)


@dataclass(frozen=True)
class Gradients:
    """Norms of gradients per record at the start of a run.

    Parameters
    ----------
    inputs : str
        The records: ``"public records"`` or ``"random inputs"``.
    weights : str
        The backbone's weights: ``"the model's own weights"`` or ``"random weights"``.
    records : int
        How many records there were.
    modes : list[Mode]
        The kinds of steps of the first two rounds.
    warnings : list[str]
        Parts that get little of the clip norm, and what to change.
    problem : str (default: "")
        Why nothing was measured.
    """

    inputs: str = ""
    weights: str = ""
    records: int = 0
    modes: list[Mode] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problem: str = ""

    def lines(self) -> Iterator[str]:
        """Yield lines for a screen."""
        if self.problem:
            yield f"not measured: {self.problem}"
            return
        yield f"norms per record at the start, on {self.records} {self.inputs} with {self.weights}"
        for mode in self.modes:
            yield f"steps of {mode.name}: {', '.join(map(str, mode.groups))}"

    def as_json(self) -> dict[str, Any]:
        """Return it in JSON types."""
        return asdict(self)


def measure(config: RunConfig, task: Task, found: Forecast, *, opened: bool) -> Gradients:
    """Measure gradients on the model at its start.

    Public records are those of the test split. They are used only if the settings name such a split
    and it shares no record with the private one (`fedlora_flwr.tasks.registry.check_splits_apart`).
    The model has its own weights if they are on this machine. Random weights can be far off, so
    they give no warning.

    Parameters
    ----------
    config : RunConfig
        The run.
    task : Task
        What is learned.
    found : Forecast
        The forecast, for the noise of a round.
    opened : bool
        Whether records may be opened.
    """
    if config.quantization != "none":
        return Gradients(problem="a plan loads no quantized weights.")
    if is_large(skeleton(config, task)):
        return Gradients(problem="a plan builds no model above 200 million weights.")
    try:
        with explained("Measuring the gradients of single records", _LOOK), seeded(0):
            return _measured(config, task, found, opened)
    except FedLoRAError as error:
        return Gradients(problem=str(error))


def _measured(config: RunConfig, task: Task, found: Forecast, opened: bool) -> Gradients:
    adapted, weights = _built(config, task)
    size = sum(parameter.numel() for parameter in adapted.model.parameters())
    count = max(_FEWEST_RECORDS, min(_MOST_RECORDS, _WORK // size))
    records, inputs = _records(task, count, opened)
    squares = squared_norms(task, adapted, records)
    modes = _modes(config, found, adapted, squares)
    own = weights != _RANDOM
    warnings = [line for mode in modes for line in _warnings(config, mode)] if own else []
    return Gradients(inputs, weights, len(records), modes, warnings)


_OWN, _RANDOM = "the model's own weights", "random weights, as its own are not on this machine"


def _built(config: RunConfig, task: Task) -> tuple[AdaptedModel, str]:
    """Build the model without asking a hub for its weights."""
    try:
        with own_copies_only(away=True):
            adapted = build_adapted(config, task)
            start_of(config, adapted)
    except FedLoRAError:
        adapted = build_unread(config, task)
        adapted.model.to(resolve_device(config.device))
        return adapted, _RANDOM
    return adapted, _OWN


def _records(task: Task, count: int, opened: bool) -> tuple[Records, str]:
    """Return public records, evenly spread, or random inputs. Private ones are never read."""
    if opened:
        try:
            check_splits_apart(task)
            public = task.test_records()
            chosen = torch.linspace(0, len(public) - 1, min(count, len(public))).long()
            return TensorRecords(public.batch(chosen)), "public records"
        except InvalidValue:
            pass  # There is no split that is known to be public.
    made_up = optional(task, "made_up_batch")
    if made_up is not None:
        return TensorRecords(made_up(count)), "random inputs"
    return stand_ins(task.test_records(), count, seed=0), "random inputs"


def squared_norms(task: Task, adapted: AdaptedModel, records: Records) -> dict[str, Tensor]:
    """Return the squared norm of each record's unclipped gradient by array, *not private*.

    Parameters
    ----------
    task : Task
        Whose loss is taken.
    adapted : AdaptedModel
        The model, on the device where it trains.
    records : Records
        Public or random records.

    Returns
    -------
    dict[str, Tensor]
        fp64, shape (records,), by the array's name.
    """
    engine, names = PrivateEngine(adapted, task.losses), list(adapted.parameters)
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    with engine.training():
        for positions in torch.split(torch.arange(len(records)), _FEWEST_RECORDS):
            for name, sample in engine.gradients_by_record(records, positions, names).items():
                norms = sample.flatten(1).double().square().sum(dim=1)
                parts[name].append(norms.detach().cpu())
    return {name: torch.cat(found) for name, found in parts.items()}


def clipped_norms(
    squares: Squares, active: Sequence[str], clip_norm: float, weights: ClipWeights = EVEN
) -> tuple[float, dict[str, tuple[float, float | None]]]:
    """Return what joint clipping leaves of each part, as means over the records.

    Parameters
    ----------
    squares : Mapping[str, Tensor]
        See `squared_norms`.
    active : Sequence[str]
        The arrays that train together.
    clip_norm : float
        C; infinity clips nothing.
    weights : ClipWeights (default: 1 for each part)
        What each part is multiplied by before the clip.

    Returns
    -------
    tuple[float, dict[str, tuple[float, float or None]]]
        The joint norm that is clipped; and by part the norm of the gradient itself, and that of the
        part after clipping over C, which is ``None`` without clipping.
    """
    weighted = (weights.of(name) ** 2 * squares[name] for name in active)
    joint = sum(weighted, torch.zeros(())).sqrt()
    longest = joint.clamp(min=clip_norm)  # min(1, C/norm)/C = 1/max(C, norm)
    found: dict[str, tuple[float, float | None]] = {}
    for part, names in by_part(active).items():
        norms = sum((squares[name] for name in names), torch.zeros(())).sqrt()
        share = weights.of_part(part) * norms / longest
        kept = None if math.isinf(clip_norm) else float(share.mean())
        found[part] = float(norms.mean()), kept
    return float(joint.mean()), found


def _modes(
    config: RunConfig, found: Forecast, adapted: AdaptedModel, squares: Squares
) -> list[Mode]:
    """Return the kinds of steps of the first two rounds."""
    strategy, layout = build_strategy(config), Layout.of(adapted.parameters, config.block_pattern)
    strategy.num_rounds = config.num_rounds
    plans = [strategy.plan(number, layout) for number in (1, 2)]
    steps = range(1, config.local_steps + 1)
    noise = _noise_of_parts(config, found, adapted, layout, plans, squares)
    modes: dict[str, Mode] = {}
    for active in dict.fromkeys(layout.active(plan, step) for plan in plans for step in steps):
        joint, parts = _clipped(config, squares, active)
        mode = Mode(joint, [Group(part, *pair, noise.get(part)) for part, pair in parts.items()])
        modes.setdefault(mode.name, mode)
    return list(modes.values())


def _clipped(
    config: RunConfig, squares: Squares, active: Sequence[str]
) -> tuple[float, dict[str, tuple[float, float | None]]]:
    return clipped_norms(squares, active, config.clip_norm, ClipWeights.configured(config))


def _noise_of_parts(
    config: RunConfig,
    found: Forecast,
    adapted: AdaptedModel,
    layout: Layout,
    plans: Sequence[ComponentPlan],
    squares: Squares,
) -> dict[str, float]:
    """Return each part's noise over its largest signal, over the rounds in which it trains.

    The noise of D coordinates has a norm in proportion to √D, and a step's signal in a part is what
    clipping leaves of the part, so both follow from the ratio of all parts together.
    """
    if found.noise_to_signal is None:
        return {}
    shapes = {name: tuple(p.shape) for name, p in adapted.parameters.items()}
    steps = range(1, config.local_steps + 1)

    def noisy(chosen: Sequence[ComponentPlan], part: str = "") -> float:
        names = tuple(name for name in layout.names if part in ("", part_of(name)))
        only = Layout(names, layout.pattern)
        return noisy_coordinates(chosen, only, shapes, config.local_steps, config.filter)

    whole, ratios = noisy(plans), {}
    for part in PARTS:
        of_rounds = []
        for plan in plans:
            kept = [
                _clipped(config, squares, layout.active(plan, step))[1].get(part) for step in steps
            ]
            signal = sum(pair[1] or 0.0 for pair in kept if pair) / config.local_steps
            if signal:
                of_rounds.append(math.sqrt(noisy([plan], part) / whole) / signal)
        if of_rounds:
            ratios[part] = found.noise_to_signal * sum(of_rounds) / len(of_rounds)
    return ratios


def _warnings(config: RunConfig, mode: Mode) -> Iterator[str]:
    """Yield a warning for each part that gets little of the clip norm, and what to change."""
    for group in mode.groups:
        # While B is 0, A has no gradient in any setting.
        none = group.part == A and not group.norm
        if group.share is not None and group.share < LEAST and not none:
            yield (
                f"{group.part} gets {group.share:.0%} of the clip norm in steps of {mode.name} at "
                f"the start: a record's gradient has norm {group.norm:.2g} there, and "
                f"{mode.joint:.2g} in all parts that are clipped with it, where clip-norm = "
                f"{config.clip_norm:g}. {_advice(config, group, mode)}"
            )


def _advice(config: RunConfig, group: Group, mode: Mode) -> str:
    longest = max(mode.groups, key=lambda other: other.norm)
    if group.norm >= LEAST * mode.joint:
        return f"The noise is made for the clip norm, so lower it towards {mode.joint:.2g}."
    if group.part == HEAD:
        return (
            f"Lower lora-alpha (now {config.lora_alpha:g}), which makes the adapters' gradients "
            "shorter, and raise lr-a and lr-b."
        )
    if longest.part != HEAD:
        return f"Train A and B in steps of their own, as strategy = {_APART!r} does."
    alpha = config.lora_alpha * longest.norm / group.norm
    weights = ClipWeights.configured(config)
    even = weights.of_part(group.part) * group.norm / longest.norm
    return (
        f"Lower clip-weight-head, now {weights.of_part(HEAD):g} (about {_rounded(even)} would give "
        f"{group.part} and head equal shares of the clip norm); or raise lora-alpha, now "
        f"{config.lora_alpha:g} (about {_rounded(alpha)} would make {group.part} and head equally "
        "long), with lower lr-a and lr-b; or set train-head = false; or compare with strategy = "
        "'head-only', which adds noise to the head alone."
    )


def _rounded(value: float) -> str:
    """Write a number with two digits that count, and without an exponent."""
    return f"{float(f'{value:.2g}'):,.10g}"
