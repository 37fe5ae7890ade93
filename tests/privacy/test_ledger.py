from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from fedlora_flwr.errors import BudgetExhausted
from fedlora_flwr.privacy.budget import Segment, epsilon_spent
from fedlora_flwr.privacy.ledger import Account, Ledger

SEGMENT = Segment(2.0, 0.1, 10)
DELTA = 1e-5


def cost(rounds: int) -> float:
    """Return ε of a number of rounds of `SEGMENT`."""
    return epsilon_spent([Segment(2.0, 0.1, 10 * rounds)], DELTA).epsilon


def account(
    client: str = "ward-1", run: str = "run-1", rounds: int = 2, scope: str = "run"
) -> Account:
    """Return an account whose budget lasts for a number of rounds, and not for one more."""
    return Account(client, run, cost(rounds) * 1.001, DELTA, scope)


def rows(path: Path) -> list[tuple[str, str, int, int]]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT client, run, round, steps FROM releases ORDER BY id").fetchall()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "state" / "ledger.sqlite")


def test_a_new_account_has_spent_nothing(ledger: Ledger) -> None:
    summary = ledger.summary(account())
    assert (summary.epsilon, summary.steps) == (0.0, 0)
    assert summary.epsilon_budget == account().epsilon
    assert summary.delta == DELTA


def test_the_summary_is_what_the_accountant_says(ledger: Ledger) -> None:
    history = [SEGMENT, Segment(1.5, 0.1, 5), SEGMENT, Segment(2.0, 0.2, 3)]
    wealthy = Account("ward-1", "run-1", 100.0, DELTA)
    for number, segment in enumerate(history, start=1):
        returned = ledger.record(wealthy, number, segment)
    summary = ledger.summary(wealthy)
    spent = epsilon_spent(history, DELTA)
    assert returned == summary
    assert summary.epsilon == pytest.approx(spent.epsilon, rel=1e-6)
    assert summary.accountant == spent.accountant
    assert summary.steps == 28


def test_a_release_past_the_budget_is_refused_and_not_written(ledger: Ledger) -> None:
    for server_round in (1, 2):
        ledger.record(account(), server_round, SEGMENT)
    before = ledger.summary(account())
    with pytest.raises(BudgetExhausted, match="10 more steps after 20"):
        ledger.record(account(), 3, SEGMENT)
    with pytest.raises(BudgetExhausted):
        ledger.check(account(), SEGMENT)
    assert ledger.summary(account()) == before
    assert rows(ledger.path) == [("ward-1", "run-1", 1, 10), ("ward-1", "run-1", 2, 10)]
    assert before.epsilon <= account().epsilon


def test_a_smaller_release_still_fits(ledger: Ledger) -> None:
    ledger.record(account(rounds=1), 1, Segment(2.0, 0.1, 9))
    with pytest.raises(BudgetExhausted):
        ledger.record(account(rounds=1), 2, SEGMENT)
    assert ledger.record(account(rounds=1), 3, Segment(2.0, 0.1, 1)).steps == 10


def test_check_writes_nothing(ledger: Ledger) -> None:
    summary = ledger.check(account(), SEGMENT)
    assert (summary.epsilon, summary.steps) == (cost(1), 10)
    assert rows(ledger.path) == []


def test_accounts_are_kept_by_client(ledger: Ledger) -> None:
    ledger.record(account("ward-1"), 1, SEGMENT)
    assert ledger.summary(account("ward-1")).steps == 10
    assert ledger.summary(account("ward-2")).steps == 0
    assert ledger.summary(account("ward-1", scope="lifetime")).steps == 10
    assert ledger.summary(account("ward-2", scope="lifetime")).steps == 0


def test_scope_run_starts_anew_and_scope_lifetime_does_not(ledger: Ledger) -> None:
    for server_round in (1, 2):
        ledger.record(account(run="run-1"), server_round, SEGMENT)
    assert ledger.record(account(run="run-2"), 1, SEGMENT).epsilon == cost(1)
    lifetime = account(run="run-3", rounds=4, scope="lifetime")
    assert ledger.summary(lifetime).epsilon == cost(3)
    assert ledger.record(lifetime, 1, SEGMENT).epsilon == cost(4)
    with pytest.raises(BudgetExhausted):
        ledger.record(lifetime, 2, SEGMENT)


def test_a_release_without_noise_counts_for_ever(ledger: Ledger) -> None:
    without_noise = Account("ward-1", "run-1", math.inf, DELTA)
    summary = ledger.record(without_noise, 1, Segment(0.0, 0.1, 10))
    assert (summary.epsilon, summary.accountant) == (math.inf, "none")
    assert rows(ledger.path) == [("ward-1", "run-1", 1, 10)]
    with pytest.raises(BudgetExhausted):
        ledger.record(account(run="run-2", rounds=100, scope="lifetime"), 1, SEGMENT)
    # Another run's budget of its own does not see it.
    ledger.record(account(run="run-2"), 1, SEGMENT)


def test_a_new_object_reads_what_another_wrote(ledger: Ledger) -> None:
    ledger.record(account(), 1, SEGMENT)
    assert Ledger(ledger.path).summary(account()) == ledger.summary(account())


def test_a_file_in_the_place_of_another_is_a_ledger_of_its_own(ledger: Ledger) -> None:
    ledger.record(account(), 1, SEGMENT)
    ledger.path.rename(ledger.path.with_name("old.sqlite"))
    assert ledger.summary(account()).steps == 0
    ledger.record(account(), 7, SEGMENT)
    assert rows(ledger.path) == [("ward-1", "run-1", 7, 10)]
    ledger.path.with_name("old.sqlite").replace(ledger.path)
    assert rows(ledger.path) == [("ward-1", "run-1", 1, 10)]
    ledger.record(account(), 2, SEGMENT)
    assert [row[2] for row in rows(ledger.path)] == [1, 2]


def test_any_number_of_ledgers_in_turns(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in (1, 2):
        for i in range(30):
            Ledger(tmp_path / f"{i}.sqlite").record(account(), number, SEGMENT)
    assert all(len(rows(tmp_path / f"{i}.sqlite")) == 2 for i in range(30))
    assert len(list(Path("/proc/self/fd").iterdir())) < before + 20


def test_a_forked_process_and_its_parent_write_to_one_ledger(ledger: Ledger) -> None:
    ledger.record(account(rounds=9), 1, SEGMENT)
    child = os.fork()
    if not child:
        ledger.record(account(rounds=9), 2, SEGMENT)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    ledger.record(account(rounds=9), 3, SEGMENT)
    assert [row[2] for row in rows(ledger.path)] == [1, 2, 3]


RECORDER = """
import sys
from pathlib import Path
from fedlora_flwr.errors import BudgetExhausted
from fedlora_flwr.privacy.budget import Segment
from fedlora_flwr.privacy.ledger import Account, Ledger

path, epsilon, wait = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
ledger = Ledger(path)
print("ready", flush=True)
sys.stdin.readline()
try:
    ledger.record(Account("ward-1", "run-1", epsilon, 1e-5), 1, Segment(2.0, 0.1, 10))
    print("recorded", flush=True)
except BudgetExhausted:
    print("exhausted", flush=True)
if wait == "wait":
    sys.stdin.readline()
    print("replied", flush=True)
"""


def recorder(path: Path, epsilon: float, wait: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RECORDER, str(path), repr(epsilon), wait],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def read(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_a_release_survives_the_kill_of_its_process(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with recorder(path, account().epsilon, "wait") as process:
        assert read(process) == "ready"
        go(process)
        assert read(process) == "recorded"
        os.kill(process.pid, signal.SIGKILL)
        assert read(process) == ""
    assert process.returncode == -signal.SIGKILL
    ledger = Ledger(path)
    assert ledger.summary(account()).steps == 10
    ledger.record(account(), 2, SEGMENT)
    with pytest.raises(BudgetExhausted):
        ledger.record(account(), 3, SEGMENT)


def test_processes_at_once_never_exceed_the_budget(tmp_path: Path) -> None:
    path, budget = tmp_path / "ledger.sqlite", account(rounds=3)
    processes = [recorder(path, budget.epsilon) for _ in range(6)]
    try:
        assert [read(process) for process in processes] == ["ready"] * 6
        for process in processes:
            go(process)
        answers = [read(process) for process in processes]
    finally:
        for process in processes:
            process.communicate()
    assert sorted(answers) == ["exhausted"] * 3 + ["recorded"] * 3
    assert len(rows(path)) == 3
    assert Ledger(path).summary(budget).epsilon <= budget.epsilon
