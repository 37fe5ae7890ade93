"""``fedlora sharpness``: how sharply the loss around an adapter bends, and what a nudge costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlora_flwr.data.records import Batch, Records, TensorRecords
from fedlora_flwr.errors import InvalidValue, explained, require
from fedlora_flwr.lora.trained_parts import parameters_of
from fedlora_flwr.tasks.evaluation import evaluating, in_order_of_length
from fedlora_flwr.trained.curvature import Surface, Vector, hutchinson, largest_eigenvalue
from fedlora_flwr.trained.evaluate import labeled_records
from fedlora_flwr.trained.opened import Adapter, OpenAdapter, opened

if TYPE_CHECKING:
    from fedlora_flwr.data.given import Table
    from fedlora_flwr.tasks.registry import Task, TaskFactory

RANDOM, ASCENT = "random", "ascent"


@dataclass(frozen=True)
class Moved:
    """Figures of an adapter whose parameters were moved.

    Parameters
    ----------
    direction : str
        ``"random"``, or ``"ascent"``: along the gradient of the loss.
    draws : int
        Directions that the figures are means of.
    metrics : Mapping[str, float]
        The task's figures there, means over the directions.
    errors : Mapping[str, float]
        Their standard errors; empty for a single direction.
    """

    direction: str
    draws: int
    metrics: Mapping[str, float]
    errors: Mapping[str, float]


@dataclass(frozen=True)
class Sharpness:
    """The loss around an adapter, on public records.

    Eigenvalue, trace and gradient belong to the coordinates that are named by ``parts``. Factors
    that are scaled against each other, ``B / c`` and ``c A``, are the same model with another
    curvature (arXiv 1703.04933). The part ``"W"`` does not depend on such a scale.

    Parameters
    ----------
    adapter : Path
        The adapter's folder.
    task : str
        The task.
    parts : Sequence[str]
        What was moved (see `fedlora_flwr.lora.trained_parts`).
    coordinates : int
        Number D of parameters in these parts.
    records : int
        Records that the loss is a mean of.
    metrics : Mapping[str, float]
        The task's figures where the adapter is.
    norm, gradient_norm : float
        Norms of the parameters and of the loss's gradient, over the D coordinates.
    largest_eigenvalue : float
        Of the Hessian of the mean loss.
    residual : float
        How far it may be from an eigenvalue (see `fedlora_flwr.trained.curvature.Eigenvalue`).
    products : int
        Products with the Hessian that it took.
    trace, trace_error : float
        Trace of the Hessian by random signs, and its standard error.
    radius : float
        Norm of each move.
    moved : Sequence[Moved]
        What moves of that norm do: in random directions, and up the gradient.

    Examples
    --------
    >>> found = Sharpness(
    ...     Path("adapter"), "digits", ["B"], 8, 10, {"loss": 0.4}, 1.0, 0.1, 2.5, 1e-4, 21,
    ...     9.0, 0.3, 0.05, [Moved("ascent", 1, {"loss": 0.5}, {})]
    ... )
    >>> found.as_json()["moved"][0]["metrics"]
    {'loss': 0.5}
    """

    adapter: Path
    task: str
    parts: Sequence[str]
    coordinates: int
    records: int
    metrics: Mapping[str, float]
    norm: float
    gradient_norm: float
    largest_eigenvalue: float
    residual: float
    products: int
    trace: float
    trace_error: float
    radius: float
    moved: Sequence[Moved]

    def as_json(self) -> dict[str, Any]:
        """Return what ``fedlora sharpness --json`` prints."""
        return {**asdict(self), "adapter": str(self.adapter), "parts": list(self.parts)}


def sharpness(
    adapter: Adapter,
    data: str | Path | Table | None = None,
    *,
    parts: Sequence[str] = ("A", "B"),
    radius: float = 0.05,
    draws: int = 10,
    probes: int = 30,
    records: int = 512,
    seed: int = 0,
    task: str | Task | TaskFactory | None = None,
    **changes: Any,
) -> Sharpness:
    """Measure the curvature of the loss around an adapter, as ``fedlora sharpness`` does.

    The largest eigenvalue is found by Lanczos with restarts on products with the Hessian, and the
    trace by Hutchinson's estimate. A move of norm ``radius`` along the gradient is the ascent step
    of sharpness-aware minimization (arXiv 2010.01412, equation 2).

    Parameters
    ----------
    adapter : str, Path or RunResult
        A run's folder, an adapter's folder, or the result of a run.
    data : str, Path, DataFrame or Dataset, optional
        Labeled records: a file, a folder, or a table; by default the run's own public records.
        *The figures are not protected*: of private records they must not be published.
    parts : Sequence[str] (default: the factors)
        The coordinates: some of ``"A"``, ``"B"``, ``"head"`` and ``"W"``, the weights of the
        adapted layers, in which all methods can be compared.
    radius : float (default: 0.05)
        Norm of a move, above 0.
    draws : int (default: 10)
        Random directions, at least 1.
    probes : int (default: 30)
        Vectors of random signs for the trace, at least 2.
    records : int (default: 512)
        Most records, at least 1; of more, evenly spread ones are taken.
    seed : int (default: 0)
        Seed of directions and signs.
    task : str, Task or callable, optional
        The task's name or object, if it is not the run's.
    **changes : Any
        Settings by key that replace those of the run, such as ``device="cpu"``.

    Raises
    ------
    InvalidValue
        The folder holds no adapter, the records cannot be read, an argument is out of range, or the
        adapter has no such part.
    FedLoRAError
        The largest eigenvalue was not found.

    Examples
    --------
    >>> import tempfile
    >>> from fedlora_flwr import simulate
    >>> folder = tempfile.mkdtemp()
    >>> result = simulate("digits", num_clients=2, num_rounds=1, local_steps=1, output=folder)
    >>> found = sharpness(result, parts=["head"], records=20, probes=2, draws=1)
    >>> found.records, found.coordinates, found.largest_eigenvalue > 0
    (20, 490, True)
    """
    require("client")
    parts = tuple(parts)
    _check(radius=radius, draws=draws, probes=probes, records=records)
    with opened(adapter, data, task, changes) as found:
        found.require_factors()
        some = _spread(labeled_records(found), records)
        with explained("Measuring the adapter", "Set fewer records, or fewer parts."):
            chosen = list(parameters_of(found.model, parts).values())
            surface = _surface(found, chosen, some)
            with evaluating(found.model):
                return _measured(found, parts, surface, chosen, some, radius, draws, probes, seed)


def _check(radius: float, **counts: int) -> None:
    if not (math.isfinite(radius) and radius > 0):
        raise InvalidValue("radius", radius, "a number above 0")
    for name, least in (("draws", 1), ("probes", 2), ("records", 1)):
        if counts[name] < least:
            raise InvalidValue(name, counts[name], f"an integer of at least {least}")


def _spread(records: Records, most: int) -> Records:
    """Return at most so many records, evenly spread."""
    if len(records) <= most:
        return records
    positions = torch.linspace(0, len(records) - 1, most).long()
    subset = getattr(records, "subset", None)
    if subset is not None:
        found: Records = subset(positions.numpy())
        return found
    return TensorRecords(records.batch(positions))


def _surface(found: OpenAdapter, parameters: Sequence[nn.Parameter], records: Records) -> Surface:
    """Return the mean loss of the records, a batch per term."""
    batches = torch.split(in_order_of_length(records), found.config.eval_batch_size)

    def loss(indices: Tensor) -> Tensor:
        device = parameters[0].device
        batch: Batch = {key: value.to(device) for key, value in records.batch(indices).items()}
        return found.task.losses(found.model, batch).sum() / len(records)

    return Surface(parameters, [partial(loss, indices) for indices in batches])


def _measured(
    found: OpenAdapter,
    parts: Sequence[str],
    surface: Surface,
    parameters: Sequence[nn.Parameter],
    records: Records,
    radius: float,
    draws: int,
    probes: int,
    seed: int,
) -> Sharpness:
    top = largest_eigenvalue(surface.product, surface.size, seed=seed)
    trace = hutchinson(surface.product, surface.size, probes=probes, seed=seed)
    gradient = surface.gradient()
    slope = float(np.linalg.norm(gradient))
    rng = np.random.default_rng(seed)
    directions = {RANDOM: [rng.standard_normal(surface.size) for _ in range(draws)]}
    if slope > 0:  # A loss without a slope has no direction of ascent.
        directions[ASCENT] = [gradient]
    moved = [
        _moved(found, surface, records, name, [radius * d / np.linalg.norm(d) for d in chosen])
        for name, chosen in directions.items()
    ]
    squares = sum(float(p.detach().double().square().sum()) for p in parameters)
    return Sharpness(
        found.folder, found.task.name, parts, surface.size, len(records),
        found.task.evaluate(found.model, records), math.sqrt(squares), slope,
        top.value, top.residual, top.products, trace.value, trace.error, radius, moved,
    )  # fmt: skip


def _moved(
    found: OpenAdapter, surface: Surface, records: Records, name: str, steps: Sequence[Vector]
) -> Moved:
    rows = []
    for step in steps:
        with surface.moved(step):
            rows.append(found.task.evaluate(found.model, records))
    table = {key: np.array([row[key] for row in rows], np.float64) for key in rows[0]}
    means = {key: float(values.mean()) for key, values in table.items()}
    count = len(steps)
    errors = {} if count < 2 else {
        key: float(values.std(ddof=1)) / math.sqrt(count) for key, values in table.items()
    }  # fmt: skip
    return Moved(name, count, means, errors)
