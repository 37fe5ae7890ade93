"""Rows that are written together are on the disk before anything of their releases leaves."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedlora_flwr.clients.local_round import LocalRound
from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.data.records import Batch as Records
from fedlora_flwr.environment import simulating
from fedlora_flwr.errors import LedgerDamaged
from fedlora_flwr.privacy.ledger import Ledger
from fedlora_flwr.privacy.ledger_batch import Batch
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies.inbox import Replies
from fedlora_flwr.wire.order import Order
from tests.privacy.ledgers import ACCOUNT, ONE, PLAN, forget
from tests.server.resuming import tiny

CLIENTS = [replace(ACCOUNT, client=f"client-{k}") for k in range(3)]


def rows(path: Path) -> list[tuple[str, int, str]]:
    """Read the file as another process does."""
    with closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT client, round, outputs FROM releases ORDER BY id").fetchall()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def test_all_rows_are_written_at_once_and_equal_those_written_one_by_one(
    ledger: Ledger, tmp_path: Path
) -> None:
    plain, batch = Ledger(tmp_path / "plain" / "ledger.sqlite"), Batch()
    for number in (1, 2):
        asked = [(account, number, ONE, PLAN, "local", f"inputs {number}") for account in CLIENTS]
        with batch.gathering():
            together = [(ledger.record(*row), ledger.vouch(*row, "bits")) for row in asked]
            assert len(rows(ledger.path)) == 3 * (number - 1)
        batch.write()
        assert together == [(plain.record(*row), plain.vouch(*row, "bits")) for row in asked]
        assert rows(ledger.path) == rows(plain.path)
    forget()  # The chain and the witness hold for a new process, too.
    assert [Ledger(ledger.path).summary(account).steps for account in CLIENTS] == [2, 2, 2]


def test_a_client_that_is_asked_twice_is_admitted_with_its_first_row(ledger: Ledger) -> None:
    batch = Batch()
    with batch.gathering():
        first = ledger.record(ACCOUNT, 1, ONE, PLAN)
        second = ledger.record(ACCOUNT, 2, ONE, PLAN)
        assert (first.steps, second.steps) == (1, 2)
    batch.write()
    assert [row[1] for row in rows(ledger.path)] == [1, 2]


def test_whoever_reads_sees_rows_that_are_held_back(ledger: Ledger) -> None:
    batch = Batch()
    with batch.gathering():
        ledger.record(ACCOUNT, 1, ONE, PLAN)
        assert ledger.summary(ACCOUNT).steps == 1
        assert len(rows(ledger.path)) == 1


def test_a_budget_over_all_runs_is_written_at_once(ledger: Ledger) -> None:
    """Another run on the same data may ask at any moment."""
    with Batch().gathering():
        ledger.record(replace(ACCOUNT, scope="lifetime"), 1, ONE, PLAN)
        assert len(rows(ledger.path)) == 1


def test_a_round_that_is_asked_again_is_paid_by_its_row(ledger: Ledger) -> None:
    row, batch = (ACCOUNT, 1, ONE, PLAN, "local", "inputs"), Batch()
    first = ledger.record(*row)
    with batch.gathering():
        assert ledger.record(*row) == ledger.vouch(*row, "bits") == first
    batch.write()
    assert rows(ledger.path) == [(ACCOUNT.client, 1, "bits")]


def test_other_threads_and_processes_hold_nothing_back(ledger: Ledger) -> None:
    with Batch().gathering():
        writer = threading.Thread(target=ledger.record, args=(CLIENTS[0], 1, ONE, PLAN))
        writer.start()
        writer.join()
        assert len(rows(ledger.path)) == 1
        if (child := os.fork()) == 0:
            Ledger(ledger.path).record(CLIENTS[1], 1, ONE, PLAN)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert len(rows(ledger.path)) == 2


def test_a_row_is_refused_if_another_process_has_used_the_account(ledger: Ledger) -> None:
    batch = Batch()
    with batch.gathering():
        for account in CLIENTS:
            ledger.record(account, 1, ONE, PLAN)
        other = threading.Thread(target=ledger.record, args=(CLIENTS[1], 1, ONE, PLAN))
        other.start()
        other.join()
    with pytest.raises(LedgerDamaged, match="another process has counted steps of client-1"):
        batch.write()
    assert [row[0] for row in rows(ledger.path)] == ["client-1"]


Respond = Callable[[int], object]


def asked(path: Path, then: Respond) -> LocalGrid:
    """Make a grid whose clients count a step, do something, and answer."""

    def app(message: Message, context: Context) -> Message:
        number = int(str(context.node_config["partition-id"]))
        Ledger(path).record(CLIENTS[number], 1, ONE, PLAN)
        then(number)
        return Message(RecordDict({"config": ConfigRecord({"n": number})}), reply_to=message)

    return LocalGrid(app, len(CLIENTS), {})


def test_rows_come_before_the_first_reply(tmp_path: Path) -> None:
    path, seen = tmp_path / "ledger.sqlite", []
    grid = asked(path, lambda _: seen.append(len(rows(path))))
    with grid.running():
        messages = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
        replies = list(grid.send_and_receive(messages))
    assert len(replies) == 3
    assert seen == [0, 0, 0]
    assert len(rows(path)) == 3


def test_no_reply_leaves_without_its_row(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"

    def lose(number: int) -> None:
        if number == 2:
            path.unlink()

    grid, left = asked(path, lose), list[Message]()
    with grid.running():
        messages = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
        Ledger(path).record(ACCOUNT, 1, ONE, PLAN)
        replies = grid.send_and_receive(messages)
        assert isinstance(replies, Replies)
        with pytest.raises(LedgerDamaged, match="it is gone, but its witness"):
            left.extend(replies.once())
        assert left == []


def test_a_failure_counts_before_its_error_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = LocalTrainer.build(tiny(tmp_path))
    local_round = LocalRound(
        trainer,
        trainer.task.client_records(0, 3),
        Ledger(tmp_path / "ledger.sqlite"),
        "ward",
        "run",
    )

    def break_down(model: object, batch: Records) -> None:
        raise RuntimeError("a record is odd")

    monkeypatch.setattr(trainer.engine, "_losses", break_down)
    with simulating(), Batch().gathering():
        with pytest.raises(RuntimeError, match="odd"):
            local_round.run(Order(server_round=1, plan="B"), dict(local_round.start))
        assert [row[0] for row in rows(tmp_path / "ledger.sqlite")] == ["ward"]


KILLED = """
import os, sys
from pathlib import Path
from fedlora_flwr.privacy.ledger import Ledger
from fedlora_flwr.privacy.ledger_batch import Batch
from tests.privacy.ledgers import ACCOUNT, ONE, PLAN

batch, ledger = Batch(), Ledger(Path(sys.argv[1]))
ledger.record(ACCOUNT, 1, ONE, PLAN)
with batch.gathering():
    ledger.record(ACCOUNT, 2, ONE, PLAN)
    os.kill(os.getpid(), 9)
"""


def test_a_kill_before_the_rows_leaves_a_ledger_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], timeout=300)
    assert done.returncode == -9
    assert [row[1] for row in rows(path)] == [1]
    assert Ledger(path).record(ACCOUNT, 2, ONE, PLAN).steps == 2
