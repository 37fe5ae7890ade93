from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlora_flwr.errors import BudgetExhausted, InvalidValue
from fedlora_flwr.privacy import ledger as ledger_module
from fedlora_flwr.privacy import ledger_connection
from fedlora_flwr.privacy.account import admit
from fedlora_flwr.privacy.budget import Segment, epsilon_spent
from fedlora_flwr.privacy.ledger import Account, Ledger
from fedlora_flwr.privacy.ledger_file import _connections

ROUND = Segment(2.0, 0.1, 10)
DELTA = 1e-5


def plan(rounds: int) -> Segment:
    return replace(ROUND, steps=10 * rounds)


def cost(rounds: int) -> float:
    """Return ε of a number of rounds of `ROUND`."""
    return epsilon_spent([plan(rounds)], DELTA).epsilon


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
    for number in (1, 2, 3):
        returned = ledger.record(account(rounds=3), number, ROUND, plan(3))
        spent = epsilon_spent([plan(number)], DELTA)
        assert returned == ledger.summary(account(rounds=3))
        assert (returned.epsilon, returned.accountant) == (spent.epsilon, "prv")
        assert returned.steps == 10 * number


def test_a_long_run_reports_an_upper_bound_and_ends_with_the_exact_number(ledger: Ledger) -> None:
    account, planned = Account("ward", "long", 8.0, 1e-3), Segment(2.0, 0.05, 411)

    def spent(steps: int) -> float:
        return epsilon_spent([replace(planned, steps=steps)], 1e-3).epsilon

    told = [
        ledger.record(account, number, replace(planned, steps=steps), planned).epsilon
        for number, steps in enumerate((127, 174, 110))
    ]
    assert told == [spent(127), spent(304), spent(411)]
    assert spent(301) <= told[1] <= 1.016 * spent(301)


def test_a_release_past_the_plan_is_refused_and_not_written(ledger: Ledger) -> None:
    wealthy = account(rounds=9)
    for server_round in (1, 2):
        ledger.record(wealthy, server_round, ROUND, plan(2))
    before = ledger.summary(wealthy)
    with pytest.raises(BudgetExhausted, match="10 more steps after 20 are beyond the 20"):
        ledger.record(wealthy, 3, ROUND, plan(2))
    assert ledger.summary(wealthy) == before
    assert rows(ledger.path) == [("ward-1", "run-1", 1, 10), ("ward-1", "run-1", 2, 10)]


def test_a_plan_past_the_budget_is_refused_at_its_start(ledger: Ledger) -> None:
    with pytest.raises(BudgetExhausted, match="30 more steps after 0 would spend"):
        ledger.record(account(rounds=2), 1, ROUND, plan(3))
    with pytest.raises(BudgetExhausted):
        ledger.check(account(rounds=2), plan(3))
    assert rows(ledger.path) == []


def test_a_smaller_release_still_fits(ledger: Ledger) -> None:
    ledger.record(account(rounds=1), 1, replace(ROUND, steps=9), plan(1))
    with pytest.raises(BudgetExhausted):
        ledger.record(account(rounds=1), 2, ROUND, plan(1))
    assert ledger.record(account(rounds=1), 3, replace(ROUND, steps=1), plan(1)).steps == 10


@pytest.mark.parametrize(
    ("other", "key"),
    [
        (Segment(2.5, 0.1, 20), "noise-multiplier"),
        (Segment(2.0, 0.05, 20), "sample-rate"),
        (Segment(2.0, 0.1, 10), "planned steps"),
        (Segment(2.0, 0.1, 21), "planned steps"),
    ],
)
def test_the_first_record_fixes_the_settings_of_a_run(
    ledger: Ledger, other: Segment, key: str
) -> None:
    ledger.record(account(rounds=9), 1, ROUND, plan(2))
    with pytest.raises(InvalidValue, match=f"^{key} = .*first round has fixed"):
        ledger.record(account(rounds=9), 2, replace(other, steps=1), other)
    assert len(rows(ledger.path)) == 1
    ledger.record(account(run="run-2", rounds=9), 1, replace(other, steps=1), other)


def test_a_release_with_other_settings_than_its_plan_is_refused(ledger: Ledger) -> None:
    with pytest.raises(InvalidValue, match="noise multiplier and sample rate"):
        ledger.record(account(), 1, Segment(0.1, 0.1, 1), plan(2))
    with pytest.raises(InvalidValue, match="server-round"):
        ledger.record(account(), 2**70, ROUND, plan(2))


def test_check_writes_nothing(ledger: Ledger) -> None:
    summary = ledger.check(account(), plan(1))
    assert (summary.epsilon, summary.steps) == (cost(1), 10)
    assert rows(ledger.path) == []


def test_accounts_are_kept_by_client(ledger: Ledger) -> None:
    ledger.record(account("ward-1"), 1, ROUND, plan(2))
    assert ledger.summary(account("ward-1")).steps == 10
    assert ledger.summary(account("ward-2")).steps == 0
    assert ledger.summary(account("ward-1", scope="lifetime")).steps == 10
    assert ledger.summary(account("ward-2", scope="lifetime")).steps == 0


def test_scope_run_starts_from_zero_and_scope_lifetime_does_not(ledger: Ledger) -> None:
    for server_round in (1, 2):
        ledger.record(account(run="run-1"), server_round, ROUND, plan(2))
    assert ledger.record(account(run="run-2"), 1, ROUND, plan(1)).epsilon == cost(1)
    lifetime = account(run="run-3", rounds=4, scope="lifetime")
    assert ledger.summary(lifetime).epsilon == cost(3)
    assert ledger.record(lifetime, 1, ROUND, plan(1)).epsilon == cost(4)
    with pytest.raises(BudgetExhausted):
        ledger.record(replace(lifetime, run="run-4"), 1, ROUND, plan(1))


def test_a_release_without_noise_counts_for_ever(ledger: Ledger) -> None:
    without_noise = Account("ward-1", "run-1", math.inf, DELTA)
    nothing = Segment(0.0, 0.1, 10)
    for server_round in (1, 2):  # It has promised nothing, so it may go on past its plan.
        summary = ledger.record(without_noise, server_round, nothing, nothing)
    assert (summary.epsilon, summary.accountant) == (math.inf, "none")
    for run_epsilon in (0.0, 1.0):
        lifetime = account(run="run-2", rounds=100, scope="lifetime")
        with pytest.raises(BudgetExhausted):
            ledger.record(replace(lifetime, run_epsilon=run_epsilon), 1, ROUND, plan(1))
    # Another run's budget of its own does not see it.
    ledger.record(account(run="run-2"), 1, ROUND, plan(1))


def test_a_new_object_reads_what_another_wrote(ledger: Ledger) -> None:
    ledger.record(account(), 1, ROUND, plan(2))
    assert Ledger(ledger.path).summary(account()) == ledger.summary(account())


def test_any_number_of_ledgers_in_turns(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in (1, 2):
        for i in range(30):
            Ledger(tmp_path / f"{i}.sqlite").record(account(), number, ROUND, plan(2))
    assert all(len(rows(tmp_path / f"{i}.sqlite")) == 2 for i in range(30))
    assert len(list(Path("/proc/self/fd").iterdir())) < before + 20


# --- reservations ---

LIFETIME = account(rounds=4, scope="lifetime")


@pytest.mark.parametrize("run_epsilon", [0.0, 0.5])
def test_a_second_run_is_told_at_its_start_what_is_left(ledger: Ledger, run_epsilon: float) -> None:
    first = replace(LIFETIME, run_epsilon=run_epsilon)
    second = replace(first, run="run-2")
    ledger.record(first, 1, ROUND, plan(3))
    with pytest.raises(BudgetExhausted, match=r"steps .*left") as caught:
        ledger.record(second, 1, ROUND, plan(3))
    assert "reserved" in str(caught.value)
    # The first run gets all that it was promised.
    for number in (2, 3):
        assert ledger.record(first, number, ROUND, plan(3)).steps == 10 * number


def test_what_is_left_may_be_reserved_by_the_second(ledger: Ledger) -> None:
    second = replace(LIFETIME, run="run-2")
    ledger.record(LIFETIME, 1, ROUND, plan(3))
    ledger.record(second, 1, ROUND, plan(1))
    for number in (2, 3):
        ledger.record(LIFETIME, number, ROUND, plan(3))
    assert ledger.summary(LIFETIME).epsilon <= LIFETIME.epsilon


def test_a_silent_run_gives_back_what_it_did_not_use(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    patient, hasty = Ledger(path), Ledger(path, lapse=0)
    first, second = LIFETIME, replace(LIFETIME, run="run-2")
    patient.record(first, 1, ROUND, plan(4))
    with pytest.raises(BudgetExhausted):
        patient.record(second, 1, ROUND, plan(2))
    assert hasty.record(second, 1, ROUND, plan(2)).steps == 20
    # The first comes back, and all that it has left to take is not there any more.
    with pytest.raises(BudgetExhausted, match="10 steps that other runs have reserved"):
        patient.record(first, 2, ROUND, plan(4))


def test_a_run_that_comes_back_reserves_the_rest_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    patient, hasty = Ledger(path), Ledger(path, lapse=0)
    second = replace(LIFETIME, run="run-2")
    hasty.record(LIFETIME, 1, ROUND, plan(3))
    hasty.record(second, 1, ROUND, plan(1))
    hasty.record(LIFETIME, 2, ROUND, plan(3))
    with pytest.raises(BudgetExhausted, match="10 steps that other runs have reserved"):
        patient.record(replace(LIFETIME, run="run-3"), 1, ROUND, plan(1))
    assert patient.record(LIFETIME, 3, ROUND, plan(3)).epsilon == cost(4)


# --- threads, processes, kills ---


def test_a_forked_process_and_its_parent_write_to_one_ledger(ledger: Ledger) -> None:
    ledger.record(account(rounds=9), 1, ROUND, plan(3))
    child = os.fork()
    if not child:
        ledger.record(account(rounds=9), 2, ROUND, plan(3))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    ledger.record(account(rounds=9), 3, ROUND, plan(3))
    assert [row[2] for row in rows(ledger.path)] == [1, 2, 3]


def test_threads_write_to_one_ledger(ledger: Ledger) -> None:
    def work(number: int) -> None:
        for server_round in range(5):
            ledger.record(account(f"ward-{number}", rounds=5), server_round, ROUND, plan(5))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(rows(ledger.path)) == 30
    assert {Ledger(ledger.path).summary(account(f"ward-{n}")).steps for n in range(6)} == {50}


def test_a_row_that_came_while_epsilon_was_worked_out_counts(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ε is worked out without a lock; what it was worked out for is compared under one."""
    second, came = replace(LIFETIME, run="run-2"), list[str]()

    def meanwhile(account: Account, *given: Any) -> Any:
        found = admit(account, *given)
        if account.run == "run-1" and not came:
            came.append(second.run)
            ledger.record(second, 1, ROUND, plan(3))
        return found

    monkeypatch.setattr(ledger_module, "admit", meanwhile)
    with pytest.raises(BudgetExhausted, match="30 more steps after 10"):
        ledger.record(LIFETIME, 1, ROUND, plan(3))
    assert [row[1] for row in rows(ledger.path)] == ["run-2"]


RECORDER = """
import sys
from pathlib import Path
from fedlora_flwr.errors import BudgetExhausted
from fedlora_flwr.privacy.budget import Segment
from fedlora_flwr.privacy.ledger import Account, Ledger
from fedlora_flwr.privacy.ledger_file import _connections

path, epsilon, run, wait = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4]
ledger = Ledger(path)
print("ready", flush=True)
sys.stdin.readline()
one = Segment(2.0, 0.1, 10)
try:
    ledger.record(Account("ward-1", run, epsilon, 1e-5, "lifetime"), 1, one, one)
    print("recorded", flush=True)
except BudgetExhausted:
    print("exhausted", flush=True)
if wait == "wait":
    sys.stdin.readline()
    print("replied", flush=True)
"""


def recorder(path: Path, epsilon: float, run: str, wait: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RECORDER, str(path), repr(epsilon), run, wait],
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
    with recorder(path, account().epsilon, "run-1", "wait") as process:
        assert read(process) == "ready"
        go(process)
        assert read(process) == "recorded"
        os.kill(process.pid, signal.SIGKILL)
        assert read(process) == ""
    assert process.returncode == -signal.SIGKILL
    lifetime = account(run="run-2", scope="lifetime")
    assert Ledger(path).record(lifetime, 1, ROUND, plan(1)).steps == 20
    with pytest.raises(BudgetExhausted):
        Ledger(path).record(replace(lifetime, run="run-3"), 1, ROUND, plan(1))


def test_processes_at_once_never_exceed_the_budget(tmp_path: Path) -> None:
    path, budget = tmp_path / "ledger.sqlite", account(rounds=3, scope="lifetime")
    processes = [recorder(path, budget.epsilon, f"run-{i}") for i in range(6)]
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


@pytest.mark.parametrize("kept", [1, 2, 4096])
def test_one_file_counts_each_of_many_clients_exactly(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    """A connection remembers the sums of some clients only."""
    monkeypatch.setattr(ledger_connection, "_KEPT", kept)
    clients = [f"partition-{number:06d}" for number in range(5)]
    for server_round in range(3):
        for client in clients[server_round:]:
            ledger.record(account(client, rounds=3), server_round, ROUND, plan(3))
    spent = [ledger.summary(account(client, rounds=3)).steps for client in clients]
    assert spent == [10, 20, 30, 30, 30]
    with pytest.raises(BudgetExhausted):
        ledger.record(account(clients[-1], rounds=3), 4, ROUND, plan(3))
    (db,) = (db for key, db in _connections.kept.items() if ledger.path in key)
    assert len(db._sums) == min(kept, 5)
