"""A ledger that is not what it was left as is noticed, named and refused."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import sqlite3
import stat
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from fedlora_flwr.errors import FedLoRAError, LedgerDamaged
from fedlora_flwr.files import private_folder
from fedlora_flwr.privacy import ledger_file
from fedlora_flwr.privacy.ledger import Account, Ledger
from fedlora_flwr.privacy.ledger_file import witness_of
from fedlora_flwr.privacy.witness import Head, HeldWitness, Witness
from tests.privacy.ledgers import ACCOUNT, ONE, PLAN, edit, forget, write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a ledger of five rows, and no process has it open."""
    path = tmp_path / "state" / "ledger.sqlite"
    write(path, 5)
    shutil.copytree(path.parent, tmp_path / "three-rows-later")
    write(path, 3)
    forget()
    return path


def swap(path: Path) -> None:
    other = path.parents[1] / "other" / "ledger.sqlite"
    write(other, 12)
    shutil.copy(other, path)


def roll_back(path: Path) -> None:
    shutil.copy(path.parents[1] / "three-rows-later" / path.name, path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def fold(path: Path) -> None:
    path.unlink()
    path.mkdir()


def rewrite_with_a_chain(path: Path) -> None:
    """Rebuild the file from the format's description, with fewer steps."""
    head = Witness(witness_of(path)).read()
    assert head is not None
    path.unlink()
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(ledger_file._RELEASES)
        db.execute(
            "INSERT INTO releases VALUES (1, 'ward', 'run', 1, 2.0, 0.1, 1, '2026-01-01T00:00:00')"
        )
        ledger_file._chain(db, Head.empty(head.ledger))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "zero bytes": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("nothing was ever spent\n" * 40),
    "cut": cut,
    "a folder": fold,
    "steps edited": lambda path: edit(path, "UPDATE releases SET steps = 0 WHERE id = 3"),
    "noise edited": lambda path: edit(path, "UPDATE releases SET noise_multiplier = 9"),
    "client edited": lambda path: edit(path, "UPDATE releases SET client = 'x' WHERE id = 8"),
    "plan edited": lambda path: edit(path, "UPDATE releases SET planned = 1 WHERE id = 1"),
    "first row deleted": lambda path: edit(path, "DELETE FROM releases WHERE id = 1"),
    "last row deleted": lambda path: edit(path, "DELETE FROM releases WHERE id = 8"),
    "all rows deleted": lambda path: edit(path, "DELETE FROM releases"),
    "row added": lambda path: edit(
        path,
        "INSERT INTO releases "
        "SELECT 9, 'w', 'r', 1, 2.0, 0.1, 1, 'now', 1, NULL, '', 'local', '', '', 'record'",
    ),
    "chain dropped": lambda path: edit(path, "PRAGMA user_version = 0"),
    "table dropped": lambda path: edit(path, "DROP TABLE releases"),
    "origin dropped": lambda path: edit(path, "DROP TABLE origin"),
    "newer version": lambda path: edit(path, "PRAGMA user_version = 7"),
    "file deleted": Path.unlink,
    "rolled back": roll_back,
    "another device's": swap,
    "rewritten": rewrite_with_a_chain,
    "witness deleted": lambda path: witness_of(path).unlink(),
    "witness emptied": lambda path: witness_of(path).write_bytes(b""),
    "witness overwritten": lambda path: witness_of(path).write_text("8 rows"),
    "witness damaged": lambda path: witness_of(path).write_text("8 rows" * 200),
    "witness a folder": lambda path: fold(witness_of(path)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_ledger_is_named_and_refused(path: Path, damage: str) -> None:
    DAMAGES[damage](path)
    for _ in range(2):  # To ask twice heals nothing.
        forget()
        with pytest.raises(LedgerDamaged, match=r"^[^\n]*ledger\.sqlite[^\n]*\.$") as caught:
            Ledger(path)
        text = str(caught.value)
        assert re.search(r"\. [A-Z]", text), "It says what to do."


@pytest.mark.parametrize("damage", ["file deleted", "rolled back", "all rows deleted", "cut"])
def test_damage_is_noticed_while_a_process_has_the_ledger_open(path: Path, damage: str) -> None:
    ledger = Ledger(path)
    ledger.record(ACCOUNT, 9, ONE, PLAN)
    DAMAGES[damage](path)
    with pytest.raises(LedgerDamaged):
        ledger.record(ACCOUNT, 10, ONE, PLAN)
    with pytest.raises(LedgerDamaged):
        ledger.summary(ACCOUNT)


def test_an_index_that_lost_a_row_is_noticed(path: Path) -> None:
    edit(
        path,
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_master SET sql = replace(sql, 'client, run)', 'client, run) WHERE id < 2')"
        " WHERE name = 'releases_of_client'",
    )
    with pytest.raises(LedgerDamaged):
        Ledger(path).summary(ACCOUNT)


def test_a_ledger_that_another_program_has_locked_is_named(path: Path) -> None:
    ledger = Ledger(path, patience=0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN EXCLUSIVE")
        for work in (
            lambda: ledger.summary(ACCOUNT),
            lambda: ledger.record(ACCOUNT, 9, ONE, PLAN),
            lambda: Ledger(path, patience=0.04),
        ):
            with pytest.raises(LedgerDamaged, match="another process has locked it"):
                work()
    assert ledger.record(ACCOUNT, 9, ONE, PLAN).steps == 9


def test_a_witness_that_another_program_has_locked_is_named(path: Path) -> None:
    ledger = Ledger(path, patience=0.05)
    with witness_of(path).open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(LedgerDamaged, match="another process has locked it"):
            ledger.record(ACCOUNT, 9, ONE, PLAN)
    assert ledger.record(ACCOUNT, 9, ONE, PLAN).steps == 9


def test_a_folder_that_cannot_be_written_is_named(path: Path) -> None:
    """As nobody, where the tests run as the superuser, who may write anywhere."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(path.parent, folder, dirs_exist_ok=True)
        read_only = folder / path.name
        for one in folder.iterdir():
            one.chmod(0o444)
        folder.chmod(0o555)
        if not (child := os.fork()):
            forget()
            try:
                if not os.geteuid():
                    os.setuid(65534)
                Ledger(read_only).record(ACCOUNT, 9, ONE, PLAN)
            except LedgerDamaged as error:
                os._exit(0 if "permissions" in str(error) else 1)
            os._exit(2)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        folder.chmod(0o755)
    assert status == 0


def test_a_place_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerDamaged, match="Check its disk, its folder"):
        Ledger(tmp_path / "file" / "ledger.sqlite")


def test_both_put_back_from_one_copy_are_a_whole_ledger(path: Path) -> None:
    # What cannot be noticed, and is said to be so.
    shutil.rmtree(path.parent)
    shutil.copytree(path.parents[1] / "three-rows-later", path.parent)
    assert Ledger(path).summary(ACCOUNT).steps == 5


def test_a_witness_in_another_folder_notices_that_all_was_deleted(tmp_path: Path) -> None:
    path, witness = tmp_path / "state" / "ledger.sqlite", tmp_path / "elsewhere" / "witness"
    Ledger(path, witness=witness).record(ACCOUNT, 1, ONE, PLAN)
    shutil.rmtree(path.parent)
    with pytest.raises(LedgerDamaged, match=r"it is gone, but its witness .* counts 1 rows"):
        Ledger(path, witness=witness)


# --- kills ---


def killed_at(point: Callable[[pytest.MonkeyPatch], None], work: Callable[[], object]) -> None:
    """Do a piece of work in a process that dies at a point of it."""
    if not (child := os.fork()):
        point(pytest.MonkeyPatch())
        work()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_the_witness(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HeldWitness, "advance", die)


def within_the_witness(patch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite

    def torn(descriptor: int, content: bytes, at: int) -> None:
        whole(descriptor, content[:100], at)
        die()

    patch.setattr(os, "pwrite", torn)


def after_the_witness(patch: pytest.MonkeyPatch) -> None:
    whole = HeldWitness.advance

    def then_die(self: HeldWitness, head: Head) -> None:
        whole(self, head)
        die()

    patch.setattr(HeldWitness, "advance", then_die)


KILLS = [before_the_witness, within_the_witness, after_the_witness]


@pytest.mark.parametrize("point", KILLS)
def test_a_kill_around_the_witness_loses_no_row_and_locks_nobody_out(
    path: Path, point: Callable[[pytest.MonkeyPatch], None]
) -> None:
    killed_at(point, lambda: Ledger(path).record(ACCOUNT, 9, ONE, PLAN))
    assert Ledger(path).summary(ACCOUNT).steps == 9
    head = Witness(witness_of(path)).read()
    assert head is not None
    assert head.rows == 9
    edit(path, "DELETE FROM releases WHERE id = 9")
    with pytest.raises(LedgerDamaged):
        Ledger(path).summary(ACCOUNT)


@pytest.mark.parametrize("point", KILLS)
def test_a_kill_while_the_ledger_is_made_locks_nobody_out(
    tmp_path: Path, point: Callable[[pytest.MonkeyPatch], None]
) -> None:
    path = tmp_path / "state" / "ledger.sqlite"
    killed_at(point, lambda: Ledger(path))
    assert not path.exists()
    write(path)
    assert Ledger(path).summary(ACCOUNT).steps == 1


def test_many_processes_make_one_ledger(tmp_path: Path) -> None:
    path = tmp_path / "state" / "ledger.sqlite"
    children = []
    for number in range(6):
        if not (child := os.fork()):
            write(path, 3, f"ward-{number}")
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    clients = [Account(f"ward-{n}", "run", 8.0, 1e-5) for n in range(6)]
    assert [Ledger(path).summary(one).steps for one in clients] == [3] * 6


# --- ledgers of the version before ---


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old" / "ledger.sqlite"
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(ledger_file._RELEASES)
        db.execute(ledger_file._INDEX)
        for number in range(1, 4):
            row = (number, "ward", "run", number, 2.0, 0.1, 1, "2026-01-01T00:00:00+00:00")
            db.execute("INSERT INTO releases VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
    path.chmod(0o644)
    return path


def test_a_ledger_without_a_chain_gets_one_once(old: Path) -> None:
    assert Ledger(old).summary(ACCOUNT).steps == 3
    assert stat.S_IMODE(old.stat().st_mode) == 0o600
    # A run that goes on over the change of versions plans from here.
    assert Ledger(old).record(ACCOUNT, 4, ONE, PLAN).steps == 4
    edit(old, "UPDATE releases SET steps = 0 WHERE id = 2")
    forget()
    with pytest.raises(LedgerDamaged, match="row 2 was changed"):
        Ledger(old)


def test_a_ledger_without_a_chain_but_with_a_gap_is_refused(old: Path) -> None:
    edit(old, "DELETE FROM releases WHERE id = 2")
    with pytest.raises(LedgerDamaged, match="it has lost rows"):
        Ledger(old)


@pytest.mark.parametrize("point", [before_the_witness, after_the_witness])
def test_a_kill_while_the_chain_is_added_locks_nobody_out(
    old: Path, point: Callable[[pytest.MonkeyPatch], None]
) -> None:
    killed_at(point, lambda: Ledger(old))
    assert Ledger(old).summary(ACCOUNT).steps == 3


def test_an_old_ledger_in_the_place_of_a_newer_one_is_refused(old: Path, path: Path) -> None:
    shutil.copy(old, path)
    with pytest.raises(LedgerDamaged, match="witness"):
        Ledger(path)


# --- modes ---


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_ledger_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "deep" / "ledger.sqlite"
    before, umask = mode(tmp_path), os.umask(0)
    try:
        write(path)
    finally:
        os.umask(umask)
    assert {mode(one) for one in path.parent.iterdir()} == {0o600}
    assert {mode(path.parent), mode(path.parents[1])} == {0o700}
    assert mode(tmp_path) == before


def test_a_folder_that_is_there_keeps_its_mode_unless_it_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    theirs, ours = tmp_path / "theirs", tmp_path / "share" / "fedlora" / "runs"
    for folder in (theirs, ours):
        folder.mkdir(parents=True)
        folder.chmod(0o755)
        private_folder(folder)
    assert (mode(theirs), mode(ours)) == (0o755, 0o700)


def test_every_error_of_a_ledger_is_one_of_ours() -> None:
    assert issubclass(LedgerDamaged, FedLoRAError)
