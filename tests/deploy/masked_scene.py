"""A fleet of four tapped devices that mask their uploads, and the runs in which they are heard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.running_fleet import running
from fedlora_flwr.clients.sum_store import SUMS, SumStore
from fedlora_flwr.config import RunConfig
from fedlora_flwr.deploy.fleet import Fleet, make_fleet, read_fleet
from fedlora_flwr.simulations.superlink import free_port
from fedlora_flwr.wire import UPLOAD
from tests.backbones.checkpoints import write_split
from tests.deploy import curious, curious_path
from tests.deploy.masked_heard import MaskedHeard
from tests.deploy.wire_scene import MARK, Taps
from tests.tasks.texts import make_checkpoint, reviews, text_config

RECORDS = {"device-01": 211, "device-02": 223, "device-03": 227, "device-04": 229}
NAMES = list(RECORDS)
WHOLE, GONE, TWO_GONE, CLEAR, CURIOUS = "whole", "gone", "two gone", "clear", "curious"
*_, LATER, LOST = NAMES
"""The devices that agree on masks and cannot read their records then: the last one in the second
run, and both in the third."""
DELTA, EPSILON, RATE = 1e-3, 1.0, 0.2


@dataclass
class MaskedScene:
    """Everything that the runs have left."""

    base: Path
    config: RunConfig
    heard: dict[str, MaskedHeard] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)
    kept: dict[str, list[str]] = field(default_factory=dict)

    @property
    def told(self) -> dict[str, str]:
        """What the devices answered to the curious server, by its question."""
        found: dict[str, str] = json.loads((self.base / curious.TOLD).read_text())
        return found

    def device(self, name: str) -> Path:
        return self.base / "fleet" / "devices" / name

    def hear(self, taps: Taps, name: str) -> MaskedHeard:
        identity = SumStore(self.device(name) / "state" / SUMS).public_identity()
        return MaskedHeard.of(taps.heard(name), self.config, bytes.fromhex(identity))


def prepare(base: Path) -> RunConfig:
    """Make a fleet of four devices, each with private records that hold the mark."""
    model = make_checkpoint("bert", base / "model")
    for split in ("train", "validation"):
        write_split(base / "public", split, reviews(16, seed=5))
    config = text_config(
        model, base / "public", input_columns="text", num_classes=2, local_steps=1, num_rounds=1,
        num_clients=4, min_clients=4, delta=DELTA, reproducible=False, trust_model="secure-sum",
        sample_rate=RATE, dropouts=1, sum_records=900, min_completion=0.0, strategy="ffa-lora",
        epsilon=EPSILON, round_timeout=240.0,
    )  # fmt: skip
    make_fleet(base / "fleet", Fleet(4, port=free_port()), config)
    for seed, (name, count) in enumerate(RECORDS.items()):
        device = base / "fleet" / "devices" / name
        rows = [{**row, "text": f"{MARK} {row['text']}"} for row in reviews(count, seed)]
        write_split(device / "data", "train", rows)
        settings = (device / "device.toml").read_text().replace("1e-5", "1e-3")
        (device / "device.toml").write_text(settings.replace("# run-epsilon", "run-epsilon"))
    return config


def play(base: Path) -> MaskedScene:
    """Let the devices take part in all runs, and return what came from them."""
    config = prepare(base)
    server = read_fleet(base / "fleet")[0].port
    scene = MaskedScene(base, config)
    taps = Taps(base, server, RECORDS, dict.fromkeys(RECORDS, frozenset()))
    with ExitStack() as stack:
        stack.enter_context(_curious_server(base))
        taps.tap(stack)
        with running(base / "fleet", base / "operator", []) as alive:
            taps.start(alive)

            def run(name: str, **changes: Any) -> None:
                changed = replace(config, run_dir=str(base / "runs" / name), **changes)
                scene.said[name] = alive.run(changed)
                taps.look(alive)
                scene.kept[name] = sorted(
                    file.name for device in NAMES for file in _secrets(scene.device(device))
                )

            run(WHOLE)
            with _away(scene.device(LOST) / "data", base / "away"):
                run(GONE)
                with _away(scene.device(LATER) / "data", base / "away too"):
                    run(TWO_GONE)
            # A server of the other trust model asks for uploads in the clear.
            clear = {"sample_rate": 0.0, "dropouts": 0, "sum_records": 0, "batch_size": 8}
            run(CLEAR, trust_model="local", **clear)
            upload = scene.hear(taps, NAMES[0]).of_stage(UPLOAD)[0]
            curious.prepare(base, upload.start, upload.order.to_config())
            run(CURIOUS)
        scene.heard = {name: scene.hear(taps, name) for name in NAMES}
    return scene


def _secrets(device: Path) -> Iterator[Path]:
    return (device / "state" / "sums").iterdir()


@contextmanager
def _curious_server(base: Path) -> Iterator[None]:
    """Let the server run the curious server's code as soon as its file is there."""
    folder = base / "server-path"
    folder.mkdir()
    shutil.copy(curious_path.__file__, folder / "sitecustomize.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(curious_path.FOLDER, str(base))
        patch.setenv(curious_path.FILE, curious.__file__)
        patch.setenv("PYTHONPATH", f"{folder}:{Path(__file__).parents[2]}")
        yield


@contextmanager
def _away(data: Path, elsewhere: Path) -> Iterator[None]:
    data.rename(elsewhere)
    yield
    elsewhere.rename(data)
