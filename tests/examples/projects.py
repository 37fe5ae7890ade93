"""Runs a copy of an example as its user would: with `flwr run`, or on a grid in this process."""

from __future__ import annotations

import importlib
import shutil
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.simulations.superlink import SimulationSuperLink

EXAMPLES = Path(__file__).parents[2] / "examples"
ALL_A, ALL_B = {"0A", "1A", "2A"}, {"0B", "1B", "2B"}
Arrays = dict[str, NDArray[Any]]


def copy_of(name: str, folder: Path) -> Path:
    """Return a copy of an example, as a stranger would have it."""
    return Path(
        shutil.copytree(
            EXAMPLES / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    )


def flwr_run(app: Path, settings: dict[str, object], clients: int = 2) -> str:
    """Run an example on Flower's simulation engine; return what it printed."""
    overrides = app.parent / "overrides.toml"
    overrides.write_text("".join(f"{key} = {_toml(value)}\n" for key, value in settings.items()))
    log_file = app.parent / "log"
    federation = f"num-supernodes={clients} client-resources-num-cpus=2"
    with log_file.open("w") as log, SimulationSuperLink(log) as superlink:
        superlink.submit(app, overrides, federation)
        while not superlink.log_ended:  # Each question for the status costs seconds of a processor.
            time.sleep(0.2)
        while not (status := superlink.status()).startswith("finished"):
            time.sleep(0.5)
    text = log_file.read_text()
    assert status == "finished:completed", text
    return text


def local_run(app: Path, package: str, settings: dict[str, object], clients: int = 2) -> None:
    """Run an example in this process."""
    config = {**defaults(app), **settings}
    with LocalGrid(module(app, package, "client_app").app, clients, config).running() as grid:
        module(app, package, "server_app").app(grid, grid.context())


def defaults(app: Path) -> dict[str, Any]:
    """Return the run config of an example's pyproject."""
    content = tomllib.loads((app / "pyproject.toml").read_text())
    config: dict[str, Any] = content["tool"]["flwr"]["app"]["config"]
    return config


def module(app: Path, package: str, name: str) -> Any:
    """Import a module of an example from its copy, always anew."""
    for loaded in [m for m in sys.modules if m.split(".")[0] == package]:
        if not str(getattr(sys.modules[loaded], "__file__", "")).startswith(str(app)):
            del sys.modules[loaded]
    sys.path.insert(0, str(app))
    try:
        return importlib.import_module(f"{package}.{name}")
    finally:
        sys.path.remove(str(app))


def rounds(folder: Path, count: int = 3) -> list[Arrays]:
    """Return the arrays of each round that an example wrote, those before training first."""
    return [dict(np.load(folder / f"round-{number}.npz")) for number in range(count + 1)]


def moved(before: Arrays, after: Arrays) -> set[str]:
    """Return which factors of which layer moved, e.g. ``"0A"``, and ``"head"``."""
    found = set()
    for name, array in before.items():
        if not np.array_equal(array, after[name]):
            layer, _, factor = name.partition(".lora_")
            found.add(f"{layer[-1]}{factor[0]}" if factor else "head")
    return found


def assert_learned_by_rolora(folder: Path, log: str) -> None:
    """Check that B and A took turns over three rounds, and that accuracy rose."""
    start, first, second, third = rounds(folder)
    assert moved(start, first) == ALL_B | {"head"}
    assert moved(first, second) == ALL_A | {"head"}
    assert moved(second, third) == ALL_B | {"head"}
    found = accuracies(log)
    assert len(found) == 4
    assert found[-1] > found[0] + 0.3


def accuracies(log: str) -> list[float]:
    """Return the accuracy of each round that an example printed."""
    lines = [line.partition("accuracy ")[2] for line in log.splitlines() if ": accuracy" in line]
    return [float(line.split()[0]) for line in lines]


def _toml(value: object) -> str:
    return str(value) if isinstance(value, int | float) else f"'{value}'"
