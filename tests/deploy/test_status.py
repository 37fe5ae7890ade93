"""``fedlora deploy status`` where no server answers; test_shared_fleet.py has one that does."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.config import RunConfig
from fedlora_flwr.deploy import expiry
from fedlora_flwr.deploy.fleet import read_fleet
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.strategies.cohort import DECLINED
from tests.cli.documented import fields
from tests.deploy.support import answer_once

SILENT = "No SuperLink answers at 127.0.0.1:"


def status(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["deploy", "status", *map(str, arguments)])
    return result.exit_code, result.output


def document(*arguments: str | Path) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["deploy", "status", *map(str, arguments), "--json"])
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = RunDirectory(tmp_path / "run")
    made.take()
    made.write_config(RunConfig(num_rounds=4))
    made.append("rounds", {"round": 0, "accuracy": 0.5, "seconds": 1.0})
    for number, spent in ((1, 1.0), (2, 1.5)):
        row = {"round": number, "client": "device-01", "epsilon": spent, "epsilon-budget": 4.0}
        made.append("clients", row)
    failures = [f"device-02: {reason}" for reason in ("it is gone", "again")]
    told = {"failures": failures, "declined": [f"ward\x1b[2J: {DECLINED}"]}
    made.append("rounds", {"round": 2, "accuracy": 0.6, "seconds": 1.0, **told})
    return made.path


def test_a_server_that_is_not_running_is_one_sentence_with_what_to_do(fleet: Path) -> None:
    code, output = status(fleet)
    assert code == 1
    sentence = " ".join(output.split()).partition("Error: ")[2]
    assert sentence.startswith(SILENT)
    assert sentence.endswith(
        "Run start.sh in the server's folder, or `systemctl start fedlora-superlink` there, and "
        "see that this machine may reach its port."
    )
    assert output.count(SILENT) == 1
    states = re.findall(r"^(device-\d+) +(\w+) +–", output, re.MULTILINE)
    assert states == [("device-01", "unknown"), ("device-02", "unknown")]


def test_dates_of_certificates_are_known_without_a_server(
    fleet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = document(fleet)
    assert SILENT in found["server"]["problem"]
    assert [one["subject"] for one in found["certificates"]] == [
        "CA certificate", "server certificate"
    ]  # fmt: skip
    assert all(one["good"] for one in found["certificates"])
    assert all(
        re.match(r"20\d\d-\d\d-\d\dT.*\+00:00$", one["ends"]) for one in found["certificates"]
    )
    monkeypatch.setattr(expiry, "SOON", timedelta(days=400))
    _, output = status(fleet)
    text = " ".join(output.split())
    fix = f"about to expire. To fix it: fedlora deploy renew {fleet}"
    assert re.search(rf"server certificate: valid from .*, {fix}", text)


def test_a_server_that_cannot_be_trusted_is_not_asked(fleet: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    made = CliRunner().invoke(app, ["deploy", "init", str(other), "--devices", "1"])
    assert made.exit_code == 0, made.output
    answer_once(other / "server", read_fleet(fleet)[0].port, times=2)
    code, output = status(fleet)
    assert code == 1
    text = " ".join(output.split())
    assert "cannot be trusted" in text
    assert text.endswith(f"`fedlora deploy check {fleet}` says what to do.")


def test_a_port_of_something_else_is_told(fleet: Path) -> None:
    answer_once(fleet / "server", read_fleet(fleet)[0].port, times=2)
    code, output = status(fleet)
    assert code == 1
    assert SILENT in " ".join(output.split())


def test_a_runs_folder_tells_rounds_and_budgets_without_a_server(fleet: Path, run: Path) -> None:
    found = document(fleet, "--run", run)
    assert set(found) == fields("deploy status")
    ours, gone, ward = found["devices"]
    assert (ours["name"], ours["round"], ours["epsilon"]) == ("device-01", 2, 1.5)
    assert (ours["epsilon_budget"], ours["budget_left"], ours["failures"]) == (4.0, 2.5, 0)
    assert (gone["name"], gone["epsilon"], gone["failures"]) == ("device-02", None, 2)
    assert (ward["state"], ward["declined"]) == ("unknown", 2)
    told = found["run"]
    assert (told["round"], told["num_rounds"], told["value"]) == (2, 4, 0.6)
    assert (told["failures"], told["ended"], told["id"]) == (2, None, None)
    _, output = status(fleet, "--run", run)
    assert "\x1b" not in output
    assert re.search(r"device-01 +unknown +– +round 2 +1\.50 +2\.50 +0$", output, re.MULTILINE)
    assert re.search(r"declined in round 2 +– +0 for this run +0$", output, re.MULTILINE)
    assert "2 of 4: accuracy 60.0%  2 failed" in output


def test_the_servers_own_folder_is_enough_on_the_server(fleet: Path) -> None:
    port = read_fleet(fleet)[0].port
    found = document(fleet / "server")
    assert found["server"]["address"] == f"127.0.0.1:{port}"
    assert [one["good"] for one in found["certificates"]] == [True, True]
    assert found["devices"] == []


def test_a_damaged_certificate_is_named(fleet: Path) -> None:
    (fleet / "server" / "server.pem").write_text("nothing")
    code, output = status(fleet)
    assert code == 1
    assert f"certificate = '{fleet}/server/server.pem' cannot be used" in " ".join(output.split())


@pytest.mark.parametrize("option", [[], ["--run"]])
def test_another_folder_is_refused(fleet: Path, tmp_path: Path, option: list[str]) -> None:
    code, output = status(*([fleet, "--run", tmp_path] if option else [tmp_path]))
    assert code == 1
    expected = "the folder of a run, with config.toml" if option else "that `fedlora deploy init`"
    assert expected in " ".join(output.split())
