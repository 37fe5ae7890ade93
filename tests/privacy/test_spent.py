"""What has been spent, by the ledger's file alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlora_flwr import Account, Ledger, Segment, epsilon_spent, spent
from fedlora_flwr.cli import app
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
    (whole,) = [entry for entry in spent(path, DELTA) if not entry.run]
    own = Ledger(path).summary(Account("a", "", 20.0, DELTA, "lifetime", 10.0))
    assert (whole.epsilon, whole.accountant) == (own.epsilon, "rdp-filter")


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
        assert heads.split() == ["client", "run", "rounds", "steps", "σ", "q", "ε", "last"]
        assert rows[2].split()[:5] == ["a", "all", "2", "5", "25"]
        assert f"{epsilon(25):.3f}" in rows[2]
        assert rows[-2:] == ["δ         0.0001", f"Ledger    {path}"]
    missing = CliRunner().invoke(app, ["ledger", str(tmp_path / "nowhere")])
    assert missing.exit_code == 1
    assert "nothing is spent where there is none" in missing.output


def test_a_devices_folder_says_where_its_ledger_is_and_its_budget(tmp_path: Path) -> None:
    write(tmp_path / "state" / "ledger.sqlite")
    file = tmp_path / "device.toml"
    file.write_text(
        'client-id = "a"\ntask = "digits"\nepsilon = 20.0\ndelta = 0.001\nstate-dir = "state"\n'
    )
    for place in (tmp_path, file):
        shown = CliRunner().invoke(app, ["ledger", str(place)])
        assert "Budget    ε ≤ 20, says device.toml" in shown.output
        assert "δ         0.001" in shown.output
