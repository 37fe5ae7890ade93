"""A ledger's file, written and edited by hand."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from fedlora_flwr.privacy import ledger_file
from fedlora_flwr.privacy.budget import Segment
from fedlora_flwr.privacy.ledger import Account, Ledger

ONE, PLAN = Segment(2.0, 0.1, 1), Segment(2.0, 0.1, 50)
ACCOUNT = Account("ward", "run", 8.0, 1e-5)


def write(path: Path, count: int = 1, client: str = "ward") -> None:
    ledger = Ledger(path)
    account = Account(client, "run", 8.0, 1e-5)
    begin = ledger.summary(account).steps
    for number in range(begin + 1, begin + count + 1):
        ledger.record(account, number, ONE, PLAN)


def forget() -> None:
    """Look at files as a fresh process does."""
    ledger_file._checked.clear()
    for db in ledger_file._connections.kept.values():
        db.close()
    ledger_file._connections.kept.clear()


def edit(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        for statement in statements:
            db.execute(statement)
