from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.examples.projects import accuracies, copy_of, flwr_run, local_run, moved, rounds


@pytest.mark.flower
def test_flwr_run_learns_privately_and_keeps_a_ledger(tmp_path: Path) -> None:
    app = copy_of("private_loop", tmp_path)
    log = flwr_run(app, {"run-dir": tmp_path, "state-dir": tmp_path / "ledgers"}, clients=3)
    start, first, second, _ = rounds(tmp_path)
    assert moved(start, first) == {"0B", "1B", "2B", "head"}
    assert moved(first, second) == {"0A", "1A", "2A", "head"}
    found = accuracies(log)
    assert len(found) == 4
    assert found[-1] > found[0] + 0.3
    with closing(sqlite3.connect(tmp_path / "ledgers" / "ledger.sqlite")) as db:
        rows = db.execute("SELECT client, round, steps, noise_multiplier FROM releases").fetchall()
    clients = {f"partition-{i:06d}" for i in range(3)}
    assert {(client, number) for client, number, *_ in rows} == {
        (client, number) for client in clients for number in (1, 2, 3)
    }
    assert all(steps == 20 and sigma > 0.5 for *_, steps, sigma in rows)
    assert "spent: ε = 7.99" in log
    assert all(f"{client}: ε = 7.9" in log for client in clients)


def test_a_wrong_key_of_the_run_config_is_named(tmp_path: Path) -> None:
    app = copy_of("private_loop", tmp_path)
    with pytest.raises(ValueError, match="did you mean 'clip-norm'"):
        local_run(app, "private_digits", {"clipnorm": 1.0})


def test_the_key_strategy_decides_what_trains(tmp_path: Path) -> None:
    app = copy_of("private_loop", tmp_path)
    state = str(tmp_path / "ledgers")
    settings = {"strategy": "ffa-lora", "num-rounds": 2, "local-steps": 2}
    local_run(
        app, "private_digits", {**settings, "run-dir": str(tmp_path), "state-dir": state}, clients=3
    )
    start, first, second = rounds(tmp_path, 2)
    assert moved(start, first) == moved(first, second) == {"0B", "1B", "2B", "head"}


def test_a_run_that_should_continue_is_refused_before_it_spends(tmp_path: Path) -> None:
    app, state = copy_of("private_loop", tmp_path), tmp_path / "ledgers"
    with pytest.raises(ValueError, match="spend the budget once more"):
        local_run(app, "private_digits", {"resume": str(tmp_path / "run"), "state-dir": str(state)})
    assert not state.exists()
