"""What a run costs if a million clients are registered and few take part, in bytes and calls.

Seconds are not asserted: a list of all clients takes 8 MB, and a loop over them a million calls.
"""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

from fedlora_flwr.clients.trainer import process_trainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.server.rounds import RoundRow
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.launch import OpenRun
from fedlora_flwr.simulations.runner import prepare_run, run_in_process

FEW, MILLION, SAMPLED, ROUNDS = 100, 1_000_000, 10, 4
LEAST_LIST = MILLION / 2
"""Less than any list or array of all clients takes."""
START = 40 * MILLION
"""Bytes for the numbers of records of all clients: an array, sorted and indexed once."""


def config(folder: Path, registered: int, cap: int = 0) -> RunConfig:
    return RunConfig.of(
        {
            "task": "tests.simulations.many:Alike", "strategy": "dp-lora", "delta": 0.1,
            "num-clients": registered, "fraction-train": SAMPLED / registered, "rank": 2,
            "num-rounds": ROUNDS, "local-steps": 1, "batch-size": 2, "device": "cpu",
            "reproducible": True, "run-dir": str(folder), "state-dir": str(folder),
            "max-rounds": cap,
        }
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import what a run imports, which is not what a run costs."""
    play(tmp_path_factory.mktemp("runs") / "first", FEW, lambda _: None)


def play(folder: Path, registered: int, on_round: Callable[[RoundRow], None], cap: int = 0) -> None:
    process_trainer.cache_clear()
    prepared = prepare_run(config(folder, registered, cap))
    summary = OpenRun(prepared, RunDirectory(folder), run_in_process).play(on_round)
    assert (summary["status"], summary["num_clients"]) == ("completed", registered)


def bytes_of(folder: Path, registered: int) -> list[int]:
    """Return the most bytes that the start and each round take beside what was there before."""
    found, before = [], 0

    def after(row: RoundRow) -> None:
        nonlocal before
        _, most = tracemalloc.get_traced_memory()
        found.append(most - before)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()

    tracemalloc.start()
    try:
        play(folder, registered, after)
    finally:
        tracemalloc.stop()
    return found


def calls_of(folder: Path, registered: int, cap: int) -> list[int]:
    """Return how many functions are called at the start, and in each round."""
    found, count = [], 0

    def called(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    def after(row: RoundRow) -> None:
        nonlocal count
        found.append(count)
        count = 0

    sys.setprofile(called)
    try:
        play(folder, registered, after, cap)
    finally:
        sys.setprofile(None)
    return found


def test_a_round_takes_no_more_memory_with_a_million_clients(tmp_path: Path) -> None:
    few, million = (bytes_of(tmp_path / str(n), n) for n in (FEW, MILLION))
    assert len(few) == len(million) == ROUNDS + 1
    assert million[0] < few[0] + START
    # The first round builds the clients' model.
    assert max(million[2:]) < max(few[2:]) + LEAST_LIST


@pytest.mark.parametrize("cap", [0, 2])
def test_a_round_calls_no_more_functions_with_a_million_clients(tmp_path: Path, cap: int) -> None:
    few, million = (calls_of(tmp_path / str(n), n, cap) for n in (FEW, MILLION))
    assert min(few[2:]) > 1000
    assert max(million[2:]) < 1.2 * max(few[2:])
    assert million[0] < few[0] + MILLION / 10
