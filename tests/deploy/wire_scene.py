"""A fleet whose two devices are tapped, and the runs in which they are heard."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.running_fleet import RunningFleet, running
from fedlora_flwr.config import RunConfig
from fedlora_flwr.deploy.fleet import Fleet, make_fleet, read_fleet
from fedlora_flwr.simulations.superlink import free_port
from tests.backbones.checkpoints import write_split
from tests.deploy import device_watch
from tests.deploy.wire_heard import EVALUATES, SIZE, UNPROTECTED, Heard, read_key
from tests.deploy.wire_tap import Tap
from tests.processes.processes import group_of, remote_ends
from tests.tasks.texts import make_checkpoint, reviews, text_config

PLAIN, OPEN = NAMES = ["device-01", "device-02"]
RECORDS = {PLAIN: 1013, OPEN: 1019}
MARK = "zyxquark"
"""A word that is in every private record, and nowhere else."""
OPTED = {PLAIN: frozenset[str](), OPEN: frozenset({SIZE, UNPROTECTED, EVALUATES})}
PERSONAL, SIZED, BROKEN, SPENT, TURNS = ("personal", "sized", "broken", "spent", "turns")
CLIP, BATCH, RATE = 0.5, 64, 0.125


@dataclass
class Scene:
    """Everything that the runs have left."""

    base: Path
    server: int
    heard: dict[str, Heard] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)

    def run_dir(self, run: str) -> Path:
        return self.base / "runs" / run

    def log(self, name: str) -> str:
        return (self.base / "operator" / f"{name}.log").read_text()


def noise_of(device: Path) -> list[float]:
    """Return the standard deviation of the noise in each release of a device's ledger."""
    with closing(sqlite3.connect(device / "state" / "ledger.sqlite")) as db:
        rows = db.execute("SELECT noise_multiplier, steps FROM releases ORDER BY id").fetchall()
    return [RATE * sigma * CLIP / BATCH * float(steps) ** 0.5 for sigma, steps in rows]


def prepare(base: Path) -> RunConfig:
    """Make a fleet of two devices, each with private records that hold the mark."""
    model = make_checkpoint("bert", base / "model")
    for split in ("train", "validation"):
        write_split(base / "public", split, reviews(16, seed=5))
    config = text_config(
        model, base / "public", input_columns="text", class_names="no,yes", batch_size=BATCH,
        local_steps=1, num_rounds=1, num_clients=2, min_clients=1, min_completion=0.0, delta=1e-4,
        epsilon=4.0, reproducible=False, clip_norm=CLIP, optimizer="sgd", momentum=0.0,
        weight_decay=0.0, lr_a=RATE, lr_b=RATE, lr_head=RATE, round_timeout=240.0,
    )  # fmt: skip
    make_fleet(base / "fleet", Fleet(2, port=free_port()), config)
    for seed, name in enumerate(NAMES):
        device = base / "fleet" / "devices" / name
        rows = [{**row, "text": f"{MARK} {row['text']}"} for row in reviews(RECORDS[name], seed)]
        write_split(device / "data", "train", rows)
        write_split(device / "data", "validation", reviews(16, seed=5 + seed))
        settings = (device / "device.toml").read_text().replace("1e-5", "1e-4")
        if name == OPEN:
            for line in ('test-split = "validation"', 'weighting = "size"'):
                assert f"# {line}" in settings
                settings = settings.replace(f"# {line}", line)
            settings = settings.replace('"lifetime"', '"run"\nreport-unprotected-metrics = true')
        (device / "device.toml").write_text(settings)
    return config


def break_records(base: Path) -> Path:
    """Put a label that is no class into the first device's records; return the sound ones."""
    data = base / "fleet" / "devices" / PLAIN / "data"
    sound = data.rename(base / "sound")
    rows = [{**row, "label": ("no", "yes")[row["label"]]} for row in reviews(RECORDS[PLAIN])]
    write_split(data, "train", [*rows[1:], {**rows[0], "label": MARK}])
    return sound


class Taps:
    """A tap for each device of a fleet.

    Parameters
    ----------
    base : Path
        The folder of the scene, with the fleet in it.
    server : int
        The server's port.
    records : Mapping[str, int]
        The number of each device's private records.
    opted : Mapping[str, frozenset of str]
        What each device's file allows.
    """

    def __init__(
        self,
        base: Path,
        server: int,
        records: Mapping[str, int],
        opted: Mapping[str, frozenset[str]],
    ) -> None:
        self.base, self.began = base, time.time()
        self.records, self.opted = records, opted
        self.taps = {name: Tap(base / "fleet" / "server", server) for name in records}
        self.ends: dict[str, set[tuple[str, int]]] = {name: set() for name in records}
        self.server = server

    def tap(self, stack: ExitStack) -> None:
        for name, tap in self.taps.items():
            stack.enter_context(tap.listening())
            script = self.base / "fleet" / "devices" / name / "start.sh"
            script.write_text(script.read_text().replace(f":{self.server}", f":{tap.port}"))

    def start(self, alive: RunningFleet) -> None:
        watch = self.base / "watch"
        watch.mkdir()
        shutil.copy(device_watch.__file__, watch / "sitecustomize.py")
        for name in self.records:
            env = {"PYTHONPATH": f"{watch}:{Path(__file__).parents[2]}"}
            alive.start(name, **env, **{device_watch.FILE: str(self.addresses(name))})

    def addresses(self, name: str) -> Path:
        return self.base / f"{name}.addresses"

    def look(self, alive: RunningFleet) -> None:
        """Ask the kernel where the devices' processes are connected to."""
        for name in self.records:
            for process in group_of(alive.processes[name].pid):
                self.ends[name] |= remote_ends(process)

    def heard(self, name: str) -> Heard:
        tap, device = self.taps[name], self.base / "fleet" / "devices" / name
        lines = self.addresses(name).read_text().splitlines()
        return Heard(
            name, self.records[name], self.opted[name], tap.port,
            read_key(device / "device.pub"), tap.calls, tap.sent, (self.began, time.time()),
            noise_of(device), lines, self.ends[name],
        )  # fmt: skip


def play(base: Path) -> Scene:
    """Let the devices take part in all runs, and return what came from them."""
    config = prepare(base)
    server = read_fleet(base / "fleet")[0].port
    scene, taps = Scene(base, server), Taps(base, server, RECORDS, OPTED)
    with ExitStack() as stack:
        taps.tap(stack)
        with running(base / "fleet", base / "operator", []) as alive:
            taps.start(alive)
            for name, changes in _runs(base):
                changed = replace(config, run_dir=str(scene.run_dir(name)), **changes)
                scene.said[name] = alive.run(changed)
                taps.look(alive)
        scene.heard = {name: taps.heard(name) for name in NAMES}
    return scene


def _runs(base: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    yield PERSONAL, {"strategy": "fedsa-lora"}
    yield SIZED, {"strategy": "dp-lora", "weighting": "size"}
    with _broken(base):
        yield BROKEN, {"strategy": "ffa-lora"}
    yield SPENT, {"strategy": "dp-lora"}
    # A server that asks some of its devices wants to know who they are.
    yield TURNS, {"strategy": "ffa-lora", "fraction_train": 0.5}


@contextmanager
def _broken(base: Path) -> Iterator[None]:
    sound = break_records(base)
    yield
    data = base / "fleet" / "devices" / PLAIN / "data"
    shutil.rmtree(data)
    sound.rename(data)
