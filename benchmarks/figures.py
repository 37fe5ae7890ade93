"""Figures of benchmarks: ratios with bars, and how they are timed, shown and saved."""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedlora_flwr.environment import machine, versions
from fedlora_flwr.files import replace_file
from fedlora_flwr.terminal import Table

Call: TypeAlias = Callable[[], object]

_MARKS = {True: "yes", False: "no", None: ""}


@dataclass(frozen=True)
class Figure:
    """One ratio of ours to a reference.

    Parameters
    ----------
    what : str
        The measured quantity and its setting.
    ours, reference : float or None
        Values in ``unit``; ``None`` if it could not be measured, which ``note`` explains.
    unit : str
        E.g. ``"s"`` or ``"MB"``.
    against : str
        Description of the reference.
    bar : float, optional
        Most that the ratio, ours ÷ reference, should be; ``None`` for a figure without a bar.
    note : str (default: "")
        Why the figure is missing, or a remark on it.
    """

    what: str
    ours: float | None
    reference: float | None
    unit: str
    against: str
    bar: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours ÷ reference."""
        if self.ours is None or not self.reference:
            return None
        return self.ours / self.reference

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; ``None`` without a bar or a ratio."""
        if self.bar is None or self.ratio is None:
            return None
        return self.ratio <= self.bar

    def as_dict(self) -> dict[str, Any]:
        """Return the figure for the JSON file."""
        measured = self.ours if self.ratio is None else self.ratio
        return {**asdict(self), "ratio": self.ratio, "measured": measured, "met": self.met}


def take_turns(calls: Mapping[str, Call], repetitions: int) -> dict[str, float]:
    """Time several calls in turns, after each has run once to warm up.

    Returns
    -------
    dict[str, float]
        Median seconds of each call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repetitions + 1):
        for name, call in calls.items():
            taken = seconds_of(call)
            if repetition:
                seconds[name].append(taken)
    return {name: statistics.median(found) for name, found in seconds.items()}


def seconds_of(call: Call) -> float:
    """Return the seconds of a call, with all that it has given a GPU to do."""
    _finish()
    begin = time.perf_counter()
    call()
    _finish()
    return time.perf_counter() - begin


def profiled(call: Call) -> Any:
    """Run a call under torch's profiler of CPU time and memory, and return the profile."""
    # By default the profiler writes a line when it starts, and another when it stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    return profile


def peak_bytes(call: Call) -> int:
    """Return the largest number of bytes that tensors took during a call, beyond those before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    held = largest = 0
    for event in profiled(call).profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            largest = max(largest, held)
    return largest


def operators(call: Call) -> int:
    """Return how many computing operators a call runs. On a GPU these are its kernel launches.

    An operator that gives an array another shape computes nothing.
    """
    with _Counter() as counter:  # type: ignore[no-untyped-call]
        call()
    return int(counter.count)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.count += not func.is_view and func.overloadpacket is not torch.ops.aten._unsafe_view
        return func(*args, **(kwargs or {}))


def table(figures: Sequence[Figure]) -> Table:
    """Return the figures as a table."""
    rows = [
        (
            figure.what,
            _number(figure.ours, figure.unit),
            _number(figure.reference, figure.unit),
            "" if figure.ratio is None else f"{figure.ratio:.3g}",
            "" if figure.bar is None else f"≤ {figure.bar:g}",
            _MARKS[figure.met],
            figure.against + (f" ({figure.note})" if figure.note else ""),
        )
        for figure in figures
    ]
    heads = ("what", "ours", "reference", "ratio", "bar", "met", "against")
    return Table(heads, rows, "<>>>>><")


def write(path: Path, command: str, found: Mapping[str, Sequence[Figure]], seconds: float) -> None:
    """Write all figures with command, machine and versions."""
    figures = {name: [f.as_dict() for f in figures] for name, figures in found.items()}
    write_content(path, command, {"seconds": round(seconds, 1), "figures": figures})


def write_content(path: Path, command: str, found: Mapping[str, Any]) -> None:
    """Write a benchmark's own content with command, machine and versions."""
    content = {
        "command": command,
        "machine": machine()
        | {
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "load_average": round(os.getloadavg()[0], 2),
        },
        "versions": versions(),
        **found,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _number(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{value:.3g} {unit}"
