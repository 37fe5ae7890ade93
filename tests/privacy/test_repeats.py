"""A ledger's rows for rounds that are asked again."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora_flwr.clients.local_round import LocalRound
from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.errors import BudgetExhausted
from fedlora_flwr.privacy import account
from fedlora_flwr.privacy.budget import Segment
from fedlora_flwr.privacy.ledger import Ledger
from fedlora_flwr.wire.order import Order
from tests.privacy.ledgers import ACCOUNT, ONE, PLAN
from tests.server.resuming import bits, tiny

ROW = (ACCOUNT, 1, ONE, PLAN, "local", "the same inputs")


def count(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        (found,) = db.execute("SELECT COUNT(*) FROM releases").fetchone()
    return int(found)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def test_the_same_bits_are_one_row_and_others_are_another(ledger: Ledger) -> None:
    first = ledger.record(*ROW)
    assert ledger.vouch(*ROW, "x") == ledger.record(*ROW) == ledger.vouch(*ROW, "x") == first
    assert count(ledger.path) == 1
    second = ledger.vouch(*ROW, "y")
    assert (count(ledger.path), second.steps) == (2, 2)
    assert second.epsilon > first.epsilon
    # Each of both answers is known now, with the account as it was then.
    assert (ledger.vouch(*ROW, "x"), ledger.vouch(*ROW, "y")) == (first, second)
    assert count(ledger.path) == 2


def test_a_row_whose_release_was_never_finished_pays_for_the_next(ledger: Ledger) -> None:
    first = ledger.record(*ROW)
    assert ledger.record(*ROW) == ledger.vouch(*ROW, "x") == first
    assert count(ledger.path) == 1


@pytest.mark.parametrize(
    "other",
    [
        (ACCOUNT, 2, ONE, PLAN, "local", ROW[-1]),
        (replace(ACCOUNT, run="another"), 1, ONE, PLAN, "local", ROW[-1]),
        (replace(ACCOUNT, client="another"), 1, ONE, PLAN, "local", ROW[-1]),
        (ACCOUNT, 1, replace(ONE, steps=2), PLAN, "local", ROW[-1]),
        (ACCOUNT, 1, ONE, PLAN, "local", "other inputs"),
        (ACCOUNT, 1, ONE, PLAN, "local", ""),
    ],
)
def test_whatever_differs_is_another_row(other: Any, ledger: Ledger) -> None:
    ledger.record(*ROW)
    ledger.vouch(*ROW, "x")
    ledger.record(*other)
    assert count(ledger.path) == 2


def test_other_bits_do_not_leave_without_budget(ledger: Ledger) -> None:
    plan = Segment(2.0, 0.1, 1)
    row = (ACCOUNT, 1, plan, plan, "local", "inputs")
    first = ledger.record(*row)
    ledger.vouch(*row, "x")
    with pytest.raises(BudgetExhausted):
        ledger.vouch(*row, "y")
    assert ledger.vouch(*row, "x") == first


def test_no_fewer_rows_than_different_answers_however_many_ask_at_once(ledger: Ledger) -> None:
    def ask(answer: str) -> None:
        own = Ledger(ledger.path)
        own.record(*ROW)
        own.vouch(*ROW, answer)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, "abcabcbca"))
    with closing(sqlite3.connect(ledger.path)) as db:
        vouched = db.execute("SELECT outputs FROM releases").fetchall()
    assert sorted(vouched) == [("a",), ("b",), ("c",)]


def test_two_that_ask_at_once_for_the_same_bits_pay_once(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one works out ε, which takes long, the other writes its row."""
    admit = account.admit
    others: list[Callable[[], Any]] = [lambda: Ledger(ledger.path).record(*ROW)]

    def slow(*arguments: Any) -> Any:
        found = admit(*arguments)
        while others:
            others.pop()()
        return found

    monkeypatch.setattr("fedlora_flwr.privacy.ledger.admit", slow)
    first = ledger.record(*ROW)
    assert count(ledger.path) == 1
    assert ledger.vouch(*ROW, "x") == first
    others.append(lambda: Ledger(ledger.path).vouch(*ROW, "y"))
    assert ledger.vouch(*ROW, "y").steps == 2
    assert count(ledger.path) == 2


def test_repeats_of_a_longer_account_say_what_they_said(ledger: Ledger) -> None:
    lifetime = replace(ACCOUNT, scope="lifetime", run_epsilon=3.0)
    row = (lifetime, 1, ONE, PLAN, "local", "inputs")
    first = ledger.record(*row)
    ledger.vouch(*row, "x")
    later = ledger.record(lifetime, 2, ONE, PLAN, "local", "more")
    assert ledger.vouch(*row, "x") == first != later


class Asked:
    """One client of the tiny task, which is asked for a round."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.config = tiny(folder, **changes)
        self.path = folder / "ledger.sqlite"
        self.trainer = LocalTrainer.build(self.config)

    def __call__(
        self, order: Order, arrays: Mapping[str, Any] | None = None, run: str = "run"
    ) -> Any:
        records = self.trainer.task.client_records(0, 1)
        made = LocalRound(self.trainer, records, Ledger(self.path), "ward", run)
        return bits(dict(made.run(order, arrays or self.trainer.start).arrays))


def test_a_client_answers_the_same_order_once_for_its_ledger(tmp_path: Path) -> None:
    client, order = Asked(tmp_path, num_rounds=9), Order(1, "B")
    first = client(order)
    assert client(order) == first
    assert count(client.path) == 1
    # A run of another name that says it continues this one.
    assert client(replace(order, continues="run"), run="later") == first
    assert count(client.path) == 1
    moved = {name: np.float32(0.5) * array for name, array in client.trainer.start.items()}
    for number, (asked, arrays) in enumerate(
        [(order, moved), (Order(1, "A"), None), (Order(2, "B"), None)], start=2
    ):
        assert client(asked, arrays) != first
        assert count(client.path) == number


def test_records_that_changed_meanwhile_are_another_release(tmp_path: Path) -> None:
    client, order = Asked(tmp_path), Order(1, "B")
    first = client(order)
    file = Path(client.config.dataset)
    np.save(file, np.load(file)[::-1])
    assert client(order) != first
    assert count(client.path) == 2


@pytest.mark.parametrize(("reproducible", "number"), [(False, 1), (True, 0)])
def test_fresh_noise_and_rounds_without_a_number_always_count(
    reproducible: bool, number: int, tmp_path: Path
) -> None:
    client = Asked(tmp_path, reproducible=reproducible)
    answers = [client(Order(number, "B")) for _ in range(2)]
    assert answers[0] != answers[1]
    assert count(client.path) == 2
