"""A ledger's rows name the trust model of what was released."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from fedlora_flwr.errors import LedgerDamaged
from fedlora_flwr.privacy.ledger import Ledger
from tests.privacy.ledgers import ACCOUNT, ONE, PLAN, edit, forget, write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a ledger of eight rows, and no process has it open."""
    path = tmp_path / "state" / "ledger.sqlite"
    write(path, 8)
    forget()
    return path


def test_a_ledger_without_trust_models_keeps_its_rows_and_their_digests(path: Path) -> None:
    drop = [
        f"ALTER TABLE releases DROP COLUMN {name}"
        for name in ("trust", "inputs", "outputs", "unit")
    ]
    edit(path, *drop, "PRAGMA user_version = 1")
    with closing(sqlite3.connect(path)) as db:
        before = db.execute("SELECT id, digest FROM releases").fetchall()

    write(path)
    Ledger(path).record(ACCOUNT, 10, ONE, PLAN, "secure-sum, 1 of 8 shares")
    forget()

    assert Ledger(path).summary(ACCOUNT).steps == len(before) + 2
    with closing(sqlite3.connect(path)) as db:
        rows = db.execute("SELECT id, digest FROM releases").fetchall()
        trust = [row[0] for row in db.execute("SELECT trust FROM releases")]
    assert rows[: len(before)] == before
    assert trust == ["local"] * (len(before) + 1) + ["secure-sum, 1 of 8 shares"]


def test_the_trust_model_of_a_row_cannot_be_edited(path: Path) -> None:
    Ledger(path).record(ACCOUNT, 9, ONE, PLAN, "secure-sum, 1 of 8 shares")
    forget()
    edit(path, "UPDATE releases SET trust = 'local' WHERE id = 9")

    with pytest.raises(LedgerDamaged, match="row 9 was changed"):
        Ledger(path)
