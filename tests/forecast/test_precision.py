"""``precision = "auto"``: it is settled before a run, and no process chooses for itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from fedlora_flwr import server_app
from fedlora_flwr.audit.audit_run import audit_run
from fedlora_flwr.cli.run_screen import describe_plan
from fedlora_flwr.client_app import app
from fedlora_flwr.config import RunConfig, read_toml
from fedlora_flwr.deploy.supervise import Restarts, supervise
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.forecast.forecast import skeleton
from fedlora_flwr.forecast.plan_run import plan_run
from fedlora_flwr.forecast.precision import settled
from fedlora_flwr.lora.auto_precision import Product, Speeds
from fedlora_flwr.lora.build import build_adapted, resolve_device
from fedlora_flwr.server.checkpoint import Checkpoints
from fedlora_flwr.server.rehearsal import build_unread
from fedlora_flwr.simulations.launch import OpenRun, open_run
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.studies.comparing import compare
from fedlora_flwr.tasks.registry import build_task
from tests.server.resuming import tiny

FAST, SLOW = Speeds(fp32=2.0, bf16=1.0), Speeds(fp32=1.0, bf16=2.0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def auto(tmp_path: Path, **changes: Any) -> RunConfig:
    return tiny(tmp_path, precision="auto", **changes)


def found_here(config: RunConfig, speeds: Speeds) -> None:
    """Write what an earlier measurement of this machine has found."""
    model = skeleton(config, build_task(config.task, config)).model
    file = Product.of(model, resolve_device(config.device), config.client_threads).file
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"fp32": speeds.fp32, "bf16": speeds.bf16}))


def played(config: RunConfig, folder: Path) -> tuple[OpenRun, dict[str, Any]]:
    opened = open_run(config, folder)
    return opened, opened.play(lambda _: None)


@pytest.mark.parametrize(("speeds", "chosen"), [(FAST, "bf16"), (SLOW, "fp32")])
def test_a_run_has_the_chosen_precision_everywhere(
    speeds: Speeds, chosen: str, tmp_path: Path
) -> None:
    config = auto(tmp_path)
    found_here(config, speeds)

    opened, summary = played(config, tmp_path / "runs")
    named = played(replace(config, precision=chosen), tmp_path / "named")[0]

    folder = opened.run_dir.path
    assert summary["precision"] == chosen
    assert read_toml(folder / "config.toml")["run"]["precision"] == chosen
    assert Checkpoints(folder).last()[0].config["precision"] == chosen
    weights = "adapter/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (named.run_dir.path / weights).read_bytes()
    assert ("Precision", str(speeds)) in describe_plan(opened.prepared)
    assert str(speeds) in (folder / "run.log").read_text()
    assert "Precision" not in dict(describe_plan(named.prepared))


def test_a_run_that_continues_keeps_its_precision(tmp_path: Path) -> None:
    config = auto(tmp_path, epsilon=float("inf"), num_rounds=2)
    found_here(config, FAST)
    first, _ = played(config, tmp_path / "runs")

    found_here(config, SLOW)
    again = replace(config, num_rounds=3, resume=str(first.run_dir.path))
    _, summary = played(again, tmp_path / "runs")

    assert summary["rounds_done"] == 3
    assert summary["precision"] == "bf16"


def test_a_plan_an_audit_and_a_comparison_choose_too(tmp_path: Path) -> None:
    config = auto(tmp_path)
    found_here(config, FAST)

    planned = plan_run(config, records=20)
    attacked = audit_run(
        config, mode="one-run", records=10, confidence=0.9999, num_rounds=1, precision="auto"
    )
    compare(
        config, ["rolora"], epsilons=[8], seeds=1, trials=0, baselines="none",
        output=tmp_path / "compared",
    )  # fmt: skip

    assert planned.config.precision == "bf16"
    assert planned.precision == str(FAST)
    assert attacked.settings["precision"] == "bf16"
    settings = json.loads((tmp_path / "compared" / "settings.json").read_text())
    assert settings["precision"] == "bf16"


def test_what_the_user_has_chosen_is_not_measured(tmp_path: Path) -> None:
    def never(_: Product) -> Speeds:
        raise AssertionError

    config = replace(auto(tmp_path), precision="bf16")
    assert settled(config, build_task(config.task, config), never) == (config, "")


def test_a_fleet_a_server_and_a_model_refuse_what_is_not_settled(tmp_path: Path) -> None:
    config, reason = auto(tmp_path, run_dir=str(tmp_path / "run")), "precision = 'auto' .* 'bf16'"
    with pytest.raises(InvalidValue, match=reason):
        supervise(tmp_path, config, Restarts(), str)
    with pytest.raises(InvalidValue, match=reason):
        server_app.main(LocalGrid(app, 1, {}), Context(0, 0, {}, RecordDict(), config.items()))
    with pytest.raises(InvalidValue, match=reason):
        build_adapted(config, build_task(config.task, config))
    with pytest.raises(InvalidValue, match=reason):
        build_unread(config, build_task(config.task, config))
    assert not (tmp_path / "run").exists()
