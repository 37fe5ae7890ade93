"""Masked sums between real SuperNodes over TLS: whole, with one gone, and with one too many."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.running_fleet import RunningFleet, running
from fedlora_flwr.config import RunConfig
from fedlora_flwr.deploy.fleet import Fleet, make_fleet
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.superlink import free_port
from tests.backbones.checkpoints import write_split
from tests.tasks.texts import make_checkpoint, reviews, text_config

pytestmark = pytest.mark.deploy
NAMES = [f"device-{number:02d}" for number in range(1, 5)]


def steps(fleet: Path, name: str) -> list[str]:
    file = fleet / "devices" / name / "state" / "ledger.sqlite"
    if not file.exists():
        return []
    with sqlite3.connect(file) as db:
        return [row[0] for row in db.execute("SELECT trust FROM releases")]


def one_round(alive: RunningFleet, config: RunConfig, folder: Path) -> dict[str, object]:
    said = alive.run(replace(config, run_dir=str(folder)))
    rows = RunDirectory(folder).rows("rounds")
    assert len(rows) == 2, said
    return dict(rows[1])


def test_real_devices_mask_and_open_a_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fleet, rows = tmp_path / "fleet", reviews(120)
    model = make_checkpoint("bert", tmp_path / "model")
    for split in ("train", "validation"):
        write_split(tmp_path / "public", split, rows[:8])
    config = text_config(
        model, tmp_path / "public", input_columns="text", num_classes=2, local_steps=1,
        num_rounds=1, num_clients=4, min_clients=4, delta=1e-3, reproducible=False,
        trust_model="secure-sum", sample_rate=0.2, dropouts=1, sum_records=200, min_completion=0.0,
        strategy="ffa-lora", epsilon=1.0,
    )  # fmt: skip
    make_fleet(fleet, Fleet(4, port=free_port()), config)
    for place, name in enumerate(NAMES):
        device = fleet / "devices" / name
        write_split(device / "data", "train", rows[place::4])
        settings = (device / "device.toml").read_text().replace("1e-5", "1e-3")
        (device / "device.toml").write_text(settings.replace("# run-epsilon", "run-epsilon"))
    with running(fleet, tmp_path / "operator", NAMES) as alive:
        whole = one_round(alive, config, tmp_path / "whole")
        # A device that cannot open its records has agreed on masks, and uploads nothing.
        (fleet / "devices" / NAMES[3] / "data").rename(tmp_path / "away-4")
        one_gone = one_round(alive, config, tmp_path / "one")
        (fleet / "devices" / NAMES[2] / "data").rename(tmp_path / "away-3")
        two_gone = one_round(alive, config, tmp_path / "two")
        # A server of the other trust model asks for uploads in the clear.
        clear = replace(
            config, trust_model="local", sample_rate=0.0, dropouts=0, sum_records=0, batch_size=8
        )
        said = alive.run(replace(clear, run_dir=str(tmp_path / "clear")))

    found = [(row["shares"], row["opened"], len(row["failures"])) for row in (whole, one_gone)]  # type: ignore[arg-type]
    assert found == [(4, True, 0), (3, True, 1)]
    assert (two_gone["shares"], two_gone["opened"]) == (2, False)
    first, last = (RunDirectory(tmp_path / name).summary() for name in ("whole", "two"))
    assert first is not None
    assert last is not None
    assert first["remarks"]["secure sum"].startswith("masked by the clients")
    assert last["final_accuracy"] == last["initial_accuracy"]
    assert "trust-model" in said
    # Who uploaded has spent, also where nothing was opened; in the clear nobody uploaded.
    share = "secure-sum, 1 of 3 shares"
    assert [steps(fleet, name) for name in NAMES] == [[share] * n for n in (3, 3, 2, 1)]
    # Nothing that hides an upload is left on a device.
    left = {p.name for name in NAMES for p in (fleet / "devices" / name / "state/sums").iterdir()}
    assert {name.split(".")[-1] for name in left} <= {"key", "json", "lock"}
