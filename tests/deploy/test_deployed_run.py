"""The real thing on loopback: TLS, registered keys, SuperLink, SuperNodes, a run to its end."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from fedlora_flwr.deploy.fleet import Fleet, make_fleet
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.superlink import free_port
from tests.backbones.checkpoints import write_split
from tests.deploy.running import running
from tests.tasks.texts import make_checkpoint, reviews, text_config

pytestmark = pytest.mark.deploy
NAMES = ["device-01", "device-02"]


def test_a_fleet_trains_on_its_devices_own_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fleet = tmp_path / "fleet"
    model = make_checkpoint("bert", tmp_path / "model")
    rows = reviews(90)
    write_split(tmp_path / "public", "train", rows[80:])
    write_split(tmp_path / "public", "validation", rows[80:])
    config = text_config(
        model, tmp_path / "public", input_columns="text", num_classes=2, batch_size=8,
        local_steps=2, num_rounds=2, num_clients=2, delta=1e-3, epsilon=50.0, lr_head=0.1,
        run_dir=str(tmp_path / "run"), reproducible=False,
    )  # fmt: skip
    make_fleet(fleet, Fleet(2, port=free_port()), config)
    for name, part in zip(NAMES, (rows[:30], rows[30:80]), strict=True):
        device = fleet / "devices" / name
        write_split(device / "data", "train", part)
        settings = (device / "device.toml").read_text().replace("1e-5", "1e-3")
        (device / "device.toml").write_text(settings)
    with running(fleet, tmp_path / "operator", NAMES) as alive:
        said = alive.run(config)

    run_dir = RunDirectory(tmp_path / "run")
    summary = run_dir.summary()
    assert summary is not None, said
    assert summary["status"] == "completed"
    assert summary["failures"] == 0
    rows_of_clients = run_dir.rows("clients")
    assert {row["client"] for row in rows_of_clients} == set(NAMES)
    # Each device spends its own budget, not the run's, and its ledger is its own.
    assert 0 < summary["epsilon_max"] <= 3.0
    assert (summary["epsilon_budget"], summary["delta"]) == (3.0, 1e-3)
    for name in NAMES:
        assert (fleet / "devices" / name / "state" / "ledger.sqlite").exists()
    # The server keeps which key each identity is bound to.
    kept = fleet / "server" / "identities.json"
    bound = json.loads(kept.read_text())
    assert set(bound) == set(NAMES)
    assert len(set(bound.values())) == 2
    # Nobody else reads that, nor the database in which uploads wait.
    for file in (kept, kept.with_name("state.sqlite")):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
