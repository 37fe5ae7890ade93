"""What has been spent, by the ledger's file alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlora_flwr import Account, Ledger, Segment, epsilon_spent, spent
from fedlora_flwr.cli import app
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue, LedgerDamaged

PLAN = Segment(noise_multiplier=1.5, sample_rate=0.1, steps=20)
DELTA = 1e-4


def write(path: Path, scope: str = "lifetime", run_epsilon: float = 0.0) -> Path:
    """Write two runs of one client, of which the second takes fewer steps, and one of another."""
    ledger = Ledger(path)
    for client, run, steps in (("a", "one", 20), ("b", "one", 10), ("a", "two", 5)):
        account = Account(client, run, 20.0, DELTA, scope, run_epsilon)
        for number in range(steps // 5):
            ledger.record(account, number + 1, replace(PLAN, steps=5), replace(PLAN, steps=steps))
    return path


def epsilon(steps: int) -> float:
    return epsilon_spent([replace(PLAN, steps=steps)], DELTA).epsilon


@pytest.mark.parametrize("scope", ["run", "lifetime"])
def test_what_is_spent_is_what_the_accountant_says_of_the_steps(scope: str, tmp_path: Path) -> None:
    found = spent(write(tmp_path / "ledger.sqlite", scope), DELTA)
    assert [(entry.client, entry.run, entry.rounds, entry.steps) for entry in found] == [
        ("a", "one", 4, 20), ("a", "two", 1, 5), ("a", "", 5, 25), ("b", "one", 2, 10)
    ]  # fmt: skip
    assert [entry.epsilon for entry in found] == [epsilon(n) for n in (20, 5, 25, 10)]
    assert {(entry.noise_multiplier, entry.sample_rate) for entry in found} == {(1.5, 0.1)}
    assert {entry.accountant for entry in found} == {"prv"}


def test_a_clients_life_under_a_filter_is_that_of_its_own_summary(tmp_path: Path) -> None:
    path = write(tmp_path / "ledger.sqlite", run_epsilon=10.0)
    whole, of_one_run = [entry for entry in spent(path, DELTA) if not entry.run]
    own = Ledger(path).summary(Account("a", "", 20.0, DELTA, "lifetime", 10.0))
    assert (whole.epsilon, whole.accountant) == (own.epsilon, "rdp-filter")
    assert (of_one_run.client, of_one_run.rounds) == ("b", 2)


def test_one_run_under_a_filter_has_spent_more_of_a_life_than_alone(tmp_path: Path) -> None:
    path, account = tmp_path / "ledger.sqlite", Account("a", "one", 4.0, DELTA, "lifetime", 2.0)
    Ledger(path).record(account, 1, PLAN, PLAN)
    alone, whole = spent(path, DELTA)
    assert (alone.run, alone.epsilon, alone.accountant) == ("one", epsilon(20), "prv")
    assert (whole.run, whole.epsilon) == ("", Ledger(path).summary(account).epsilon)
    assert whole.epsilon > 1.2 * alone.epsilon


def test_a_budget_says_by_which_rule_a_life_is_counted(tmp_path: Path) -> None:
    """A ledger of fixed settings does not tell that its owner has chosen the filter since."""
    path = tmp_path / "ledger.sqlite"
    Ledger(path).record(Account("a", "one", 4.0, DELTA, "lifetime"), 1, PLAN, PLAN)
    assert [entry.run for entry in spent(path, DELTA)] == ["one"]
    for share in (0.0, 2.0):
        account = Account("a", "", 4.0, DELTA, "lifetime", share)
        _, whole = spent(path, DELTA, account)
        own = Ledger(path).summary(account)
        assert (whole.epsilon, whole.accountant) == (own.epsilon, own.accountant)


def test_a_release_without_noise_has_no_epsilon(tmp_path: Path) -> None:
    path, plan = tmp_path / "ledger.sqlite", Segment(0.0, 0.1, 1)
    Ledger(path).record(Account("a", "one", float("inf"), DELTA), 1, plan, plan)
    assert spent(path, DELTA)[0].epsilon == float("inf")
    shown = CliRunner().invoke(app, ["ledger", str(path), "--json"])
    assert json.loads(shown.output)[0]["epsilon"] is None


def test_what_is_no_ledger_or_a_damaged_one_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match=r"ledger = .*none.sqlite"):
        spent(tmp_path / "none.sqlite", DELTA)
    assert not list(tmp_path.iterdir())
    path = write(tmp_path / "ledger.sqlite")
    with pytest.raises(InvalidValue, match="delta = 1"):
        spent(path, 1.0)
    (tmp_path / "text").write_text("no ledger")
    with pytest.raises(LedgerDamaged):
        spent(tmp_path / "text", DELTA)


def test_the_command_needs_the_file_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "ledger.sqlite")
    for place in (path, tmp_path):
        shown = CliRunner().invoke(app, ["ledger", str(place), "--delta", str(DELTA)])
        assert shown.exit_code == 0, shown.output
        heads, *rows = shown.output.splitlines()
        assert re.split("  +", heads.strip()) == [
            "client", "run", "rounds", "steps", "σ", "q", "ε of the run alone", "ε of all runs",
            "accountant", "for each", "last",
        ]  # fmt: skip
        assert rows[2].split()[:5] == ["a", "all", "2", "5", "25"]
        assert f"{epsilon(25):.3f}" in rows[2]
        assert rows[-2:] == ["δ         0.0001", f"Ledger    {path}"]
    missing = CliRunner().invoke(app, ["ledger", str(tmp_path / "nowhere")])
    assert missing.exit_code == 1
    assert "nothing is spent where there is none" in missing.output


def device(folder: Path, *lines: str) -> Path:
    """Write a device's file."""
    folder.mkdir(exist_ok=True)
    settings = ('client-id = "a"', 'task = "digits"', "delta = 0.0001", 'state-dir = "state"')
    (folder / "device.toml").write_text("\n".join([*settings, *lines]))
    return folder


def shown(*arguments: str) -> str:
    found = CliRunner().invoke(app, ["ledger", *arguments])
    assert found.exit_code == 0, found.output
    return found.output


def test_a_devices_folder_says_where_its_ledger_is_and_its_budget(tmp_path: Path) -> None:
    write(tmp_path / "state" / "ledger.sqlite")
    device(tmp_path, "epsilon = 20.0")
    for place in (tmp_path, tmp_path / "device.toml"):
        said = shown(str(place), "--delta", "0.001")
        assert "Budget    ε ≤ 20, says device.toml" in said
        assert "δ         0.001" in said


@pytest.mark.parametrize("share", [0.0, 2.0])
def test_a_device_is_told_what_is_left_after_its_first_run(tmp_path: Path, share: float) -> None:
    device(tmp_path, "epsilon = 4.0", f"run-epsilon = {share}")
    ledger = Ledger(tmp_path / "state" / "ledger.sqlite")
    account = Account("a", "one", 4.0, DELTA, "lifetime", share)
    ledger.record(account, 1, PLAN, PLAN)
    own = ledger.summary(account)
    lines = shown(str(tmp_path)).splitlines()
    assert lines[2].split()[:4] == ["a", "all", "1", "1"]
    assert f"{own.epsilon:.3f}" in lines[2]
    left = f"{own.epsilon:.2f} of 4 ({own.accountant}); left {4 - own.epsilon:.2f}"
    assert f"Spent     {left}" in lines


def test_where_each_run_has_a_budget_nothing_is_said_to_be_left(tmp_path: Path) -> None:
    write(tmp_path / "state" / "ledger.sqlite", "run")
    said = shown(str(device(tmp_path, "epsilon = 4.0", 'ledger-scope = "run"')))
    assert "Budget    ε ≤ 4, says device.toml, for each run" in said
    assert "left" not in said


def test_a_new_device_has_spent_nothing(tmp_path: Path) -> None:
    said = shown(str(device(tmp_path, "epsilon = 4.0")))
    assert said.startswith("Spent     Nothing spent yet.\nBudget    ε ≤ 4, says device.toml\n")
    assert not (tmp_path / "state").exists()
    assert json.loads(shown(str(tmp_path), "--json")) == []


def test_a_ledger_that_was_deleted_is_not_said_to_be_unspent(tmp_path: Path) -> None:
    write(tmp_path / "state" / "ledger.sqlite").unlink()
    lost = CliRunner().invoke(app, ["ledger", str(device(tmp_path, "epsilon = 20.0"))])
    assert lost.exit_code == 1
    assert "Nothing spent" not in lost.output


def test_a_runs_ledger_is_shown_at_the_delta_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    nothing = " ".join(CliRunner().invoke(app, ["ledger"]).output.split())
    hint = "A simulation keeps its ledger in its run folder: `fedlora ledger runs/latest`"
    assert hint in nothing
    run = tmp_path / "runs" / "latest"
    run.mkdir(parents=True)
    write(run / "ledger.sqlite")
    assert RunConfig.delta != DELTA
    without = CliRunner().invoke(app, ["ledger", str(run)]).output
    assert f"δ         {RunConfig.delta:g}, the default" in without
    (run / "config.toml").write_text(RunConfig(delta=DELTA).to_toml())
    for arguments in ([], [str(run)], [str(run / "ledger.sqlite")]):
        said = shown(*arguments)
        assert "δ         0.0001, says config.toml beside the ledger" in said
        assert f"{epsilon(25):.3f}" in said
