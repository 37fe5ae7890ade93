"""Runs of a tiny task that are killed at a write, and go on; and what has to be equal then."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from safetensors.numpy import load_file

from benchmarks.soak_simulation import releases, timeless_rows
from fedlora_flwr import files
from fedlora_flwr.client_app import app
from fedlora_flwr.config import RunConfig
from fedlora_flwr.privacy.ledger_file import Writer
from fedlora_flwr.server import rows_file
from fedlora_flwr.server.checkpoint import Checkpoint, Checkpoints
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.server.serve import run_federation
from fedlora_flwr.simulations.local_grid import LocalGrid
from tests.hostile.tiny_task import NAME, points
from tests.privacy.ledgers import forget

TINY: dict[str, Any] = {
    "task": NAME, "test-split": "test", "num-clients": 3, "num-rounds": 3, "local-steps": 2,
    "batch-size": 4, "rank": 2, "epsilon": 8.0, "delta": 1e-2, "device": "cpu",
    "reproducible": True, "partitioner": "iid",
}  # fmt: skip
WRITES: tuple[tuple[Any, str], ...] = (
    (os, "fsync"), (os, "fdatasync"), (os, "pwrite"), (os, "truncate"), (Path, "replace"),
    (Path, "rename"), (Path, "unlink"), (Path, "write_bytes"), (files, "_exchange"),
    (rows_file, "append"), (Writer, "append"), (Writer, "settle"),
)  # fmt: skip


ledger, rows = releases, timeless_rows


class Killed(BaseException):
    """Nothing that comes after this is done."""


class Deadly:
    """Counts what is before and after each write, and lets nothing pass from one of them on."""

    def __init__(self, at: int = 0) -> None:
        self.seen, self._at = 0, at

    def _pass(self) -> None:
        self.seen += 1
        if self._at and self.seen >= self._at:
            raise Killed

    def around(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def between(*args: Any, **kwargs: Any) -> Any:
            self._pass()
            found = work(*args, **kwargs)
            self._pass()
            return found

        return between

    @contextmanager
    def watching(self) -> Iterator[None]:
        patches = [
            mock.patch.object(owner, name, self.around(getattr(owner, name)))
            for owner, name in WRITES
        ]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


def tiny(folder: Path, **changes: Any) -> RunConfig:
    """Return a quick run of the tiny task."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "private.npy", points(1))
    np.save(folder / "test.npy", points(2))
    dashed = {key.replace("_", "-"): value for key, value in changes.items()}
    return RunConfig.of({**TINY, "dataset": str(folder / "private.npy")}, dashed)


def begin(config: RunConfig, folder: Path, deadly: Deadly | None = None) -> dict[str, Any]:
    """Begin a run, or continue it where ``config.resume`` says so, as a fresh process does."""
    forget()
    config = replace(config, state_dir=str(folder))
    run_dir = RunDirectory(folder, resume=bool(config.resume))
    grid = LocalGrid(app, config.num_clients, config.items())
    with grid.running(), (deadly or Deadly()).watching():
        return run_federation(grid, config, run_dir)


def resume(config: RunConfig, folder: Path, deadly: Deadly | None = None) -> dict[str, Any]:
    """Go on with the run in a folder."""
    return begin(replace(config, resume=str(folder)), folder, deadly)


def killed(work: Callable[..., Any], config: RunConfig, folder: Path, at: int) -> bool:
    """Do the work until it is killed; return whether it was."""
    try:
        work(config, folder, Deadly(at))
    except Killed:
        return True
    return False


def has_begun(folder: Path) -> bool:
    """Tell whether there is a checkpoint; without one nothing has been asked of a client."""
    return Checkpoints(folder).any()


def state(folder: Path) -> Any:
    """Return all that the last checkpoint carries, as bits."""
    last, damaged = Checkpoints(folder).last()
    assert not damaged
    return bits(replace(last, run="", config={}, files={}, seconds=0.0))


def bits(value: Any) -> Any:
    """Return a value that is equal to another's where all bits are."""
    if isinstance(value, Checkpoint):
        return bits(vars(value))
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        return {name: bits(inner) for name, inner in value.items()}
    return [bits(inner) for inner in value] if isinstance(value, list) else value


def assert_same(first: Path, second: Path) -> None:
    """Compare two finished runs, bit for bit."""
    for name in ("rounds", "clients"):
        assert rows(first, name) == rows(second, name)
    assert ledger(first) == ledger(second)
    assert state(first) == state(second)
    for name in ("adapter", *(["best"] if (first / "best").exists() else [])):
        one, other = (
            load_file(run / name / "adapter_model.safetensors") for run in (first, second)
        )
        assert bits(dict(one)) == bits(dict(other))
    told = [RunDirectory(run).summary() for run in (first, second)]
    clean = [{k: v for k, v in (found or {}).items() if k != "seconds"} for found in told]
    assert clean[0] == clean[1]
