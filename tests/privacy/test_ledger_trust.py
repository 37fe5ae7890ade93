"""A ledger's rows name the trust model of what was released."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora_flwr.errors import InvalidValue, LedgerDamaged
from fedlora_flwr.privacy.ledger import Account, Ledger
from fedlora_flwr.privacy.spent import spent
from tests.privacy.ledgers import ACCOUNT, ONE, PLAN, edit, forget, write

WARD_AND_DESK = [0.4501816359032502, 3.0998681947606643]
"""ε of both clients by the version that wrote `format_3.sql`."""


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


def test_a_ledger_of_the_version_before_users_keeps_rows_totals_and_filter(tmp_path: Path) -> None:
    """The files are those that version 3 wrote; version 4 added the unit of each release."""
    path, here = tmp_path / "ledger.sqlite", Path(__file__).parent
    with closing(sqlite3.connect(path)) as db:
        db.executescript((here / "format_3.sql").read_text("utf-8"))
        before = db.execute("SELECT * FROM releases").fetchall()
    shutil.copy(here / "format_3.witness", f"{path}.witness")
    desk = Account("desk", "run", 8.0, 1e-5, "lifetime", 2.0)

    ledger = Ledger(path)
    totals = [ledger.summary(account) for account in (ACCOUNT, desk)]

    # What version 3 itself said of these rows.
    assert [(found.steps, found.accountant) for found in totals] == [(2, "prv"), (2, "rdp-filter")]
    assert [found.epsilon for found in totals] == pytest.approx(WARD_AND_DESK, rel=1e-9)
    assert {(row.client, row.unit) for row in spent(path, 1e-5)} == {
        ("ward", "record"), ("desk", "record")
    }  # fmt: skip
    ledger.record(ACCOUNT, 3, ONE, PLAN)
    with pytest.raises(InvalidValue, match="the unit of this data's earlier releases"):
        ledger.record(replace(desk, run="other", unit="user"), 3, ONE, ONE)
    forget()
    assert Ledger(path).summary(ACCOUNT).steps == 3
    with closing(sqlite3.connect(path)) as db:
        rows = db.execute("SELECT * FROM releases").fetchall()
    assert [row[: len(before[0])] for row in rows[: len(before)]] == before
    assert [row[-1] for row in rows] == ["record"] * 5
