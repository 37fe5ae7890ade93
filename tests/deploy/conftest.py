from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from fedlora_flwr.config import RunConfig
from fedlora_flwr.deploy.fleet import Fleet, make_fleet, stated
from fedlora_flwr.simulations.superlink import free_port
from tests.backbones.checkpoints import write_split
from tests.tasks.texts import make_checkpoint, reviews, text_config


@pytest.fixture
def activated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find commands as in a shell in which the package's environment is active."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    make_fleet(tmp_path / "fleet", Fleet(2, port=free_port()))
    return tmp_path / "fleet"


@pytest.fixture
def planned(fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Return a run whose model and records every device has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = make_checkpoint("bert", tmp_path / "model")
    config = text_config(
        model, tmp_path / "public", input_columns="text", num_classes=2, batch_size=8,
        local_steps=2, num_rounds=3, delta=1e-3,
    )  # fmt: skip
    rows = reviews(80)
    write_split(tmp_path / "public", "train", rows[:4])
    write_split(tmp_path / "public", "validation", rows[:4])
    for number, name in enumerate(("device-01", "device-02")):
        folder = fleet / "devices" / name
        write_split(folder / "data", "train", rows[number::2])
        settings = (folder / "device.toml").read_text().replace("1e-5", "1e-3")
        settings = settings.replace('task = "digits"\n', stated(config))
        (folder / "device.toml").write_text(settings)
    return config
