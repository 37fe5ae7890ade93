from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from fedlora_flwr.config import RunConfig
from fedlora_flwr.processes import uncollected
from tests.support.forks import ALONE

# A first call that warms torch up takes longer than Hypothesis waits; time is not what is tested.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# Two processes of one thread each are faster on two cores than two that fight over both.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Fixtures of tasks, data and backbones: settings, tiny models and an empty cache.
pytest_plugins = ["tests.tasks.fixtures"]

MakeConfig = Callable[..., RunConfig]

# Small enough for a round in a fraction of a second. Clients of equal size share one σ.
QUICK: dict[str, Any] = {
    "partitioner": "iid",
    "num-clients": 3,
    "num-rounds": 2,
    "local-steps": 2,
    "batch-size": 16,
    "device": "cpu",
    "reproducible": True,
}


# The longest first: fleets and Ray runs of minutes each, then files of 20 seconds and more.
LONGEST = (
    "test_shared_fleet.py",
    "test_docs.py",
    "test_faults.py",
    "test_masked_wire.py",
    "test_survives.py",
    "test_flwr_run.py",
    "test_audit.py",
    "test_pages.py",
    "test_recipes.py",
    "test_resume.py",
    "test_every_method.py",
    "test_arrays.py",
    "test_orders.py",
    "test_clients.py",
    "test_rehearsal.py",
    "test_any_data.py",
    "test_workers.py",
    "test_llm_benchmark.py",
    "test_sequences.py",
    "test_run_config.py",
    "test_start.py",
    "test_planted.py",
    "test_twins.py",
    "test_endings.py",
    "test_ten_rows.py",
    "test_installations.py",
    "test_packaging.py",
    "test_results.py",
    "test_masked_sum.py",
)


# What tries very many inputs, or starts many processes: half of the time of all tests.
SLOW = (
    "audit/test_black_box.py",
    "benchmarks",
    "data/test_any_data.py",
    "docs/test_pages.py",
    "examples",
    "hostile",
    "lora/test_small_gpu.py",
    "processes/test_workers.py",
    "server/test_rehearsal.py",
    "server/test_resume.py",
    "simulations/test_every_method.py",
    "simulations/test_recipes.py",
    "studies",
    "test_installations.py",
    "test_operating_systems.py",
    "test_packaging.py",
)


LONGEST_RUN = 2 * 3600  # seconds

# Each row of a ledger waits for the disk. In memory the tests need not wait, and write the same.
MEMORY, ENOUGH = Path("/dev/shm"), 8 * 2**30
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ENOUGH:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def pytest_configure(config: pytest.Config) -> None:
    """Keep caches of tests out of the user's; noise and backbones serve the next run, too."""
    if os.environ.get(ALONE):  # The process that began this one has set up the cache.
        return
    # The Makefile's targets share what is expensive. Another cache folder holds all of its own.
    folder = config.rootpath / str(config.getini("cache_dir"))
    shared = config.rootpath / ".pytest_cache"
    cache = (shared if folder.is_relative_to(shared) else folder) / "home"
    os.environ["XDG_CACHE_HOME"] = str(cache)
    if not hasattr(config, "workerinput"):
        for name in ("fedlora/datasets", "fedlora/frozen", "huggingface"):
            remove_old(cache / name)


def remove_old(folder: Path) -> None:
    """Remove what earlier runs left. Data sets of tests lie in new folders each time."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.stat().st_mtime < time.time() - LONGEST_RUN:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark slow tests, unless their file is named; start with the files that take longest.

    No process then ends with one of these alone.
    """
    for item in () if any(".py" in arg for arg in config.args) else items:
        path = item.path.relative_to(Path(__file__).parent)
        if not {path.as_posix(), path.parts[0]}.isdisjoint(SLOW):
            item.add_marker("slow")
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import what all tests use without looking through it for garbage, then or ever after."""
    with uncollected():
        collected = yield
        gc.freeze()
    return collected


@pytest.fixture(autouse=True)
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep ledgers and runs of tests out of the user's data folder."""
    folder = tmp_path / "data"
    monkeypatch.setenv("XDG_DATA_HOME", str(folder))
    return folder


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    """Return a function that makes a quick configuration of digits with a ledger of its own."""

    def make(**changes: Any) -> RunConfig:
        dashed = {key.replace("_", "-"): value for key, value in changes.items()}
        return RunConfig.of({**QUICK, "state-dir": str(tmp_path / "state")}, dashed)

    return make
