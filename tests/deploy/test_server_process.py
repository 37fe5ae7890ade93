"""A fleet's server ends with its SuperExec, and waits for its database longer than Flower does."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from benchmarks.running_fleet import running
from fedlora_flwr.config import RunConfig
from fedlora_flwr.deploy.fleet import Fleet, make_fleet
from fedlora_flwr.simulations.superlink import free_port

WRITES = """
import sys
from sqlalchemy import create_engine, event, text
from fedlora_flwr.deploy.server_process import wait_longer_for_the_database
wait_longer_for_the_database()
from flwr.supercore.sql_mixin import _set_sqlite_pragmas
engine = create_engine(f"sqlite:///{sys.argv[1]}")
event.listen(engine, "connect", _set_sqlite_pragmas)
with engine.begin() as link:
    print("waits", flush=True)
    link.execute(text("INSERT INTO rows VALUES (1)"))
"""


@pytest.mark.deploy
def test_a_server_whose_superexec_is_killed_ends_and_says_so(tmp_path: Path) -> None:
    make_fleet(tmp_path / "fleet", Fleet(1, port=free_port()), RunConfig(task="digits"))
    with running(tmp_path / "fleet", tmp_path / "home", []) as fleet:
        server = fleet.processes["server"]
        (superexec,) = psutil.Process(server.pid).children()
        assert "flower-superexec" in " ".join(superexec.cmdline())
        os.kill(superexec.pid, signal.SIGKILL)
        assert server.wait(60) is not None
        said = fleet.log("server").read_text()
        assert "The server's SuperExec was killed, so its SuperLink ends too." in said


def test_a_writer_waits_longer_than_five_seconds_for_another(tmp_path: Path) -> None:
    file = tmp_path / "state.sqlite"
    other = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    other.execute("PRAGMA journal_mode = WAL")
    other.execute("CREATE TABLE rows (n)")
    other.execute("BEGIN IMMEDIATE")
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITES, str(file)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "waits\n"
    threading.Timer(7, other.execute, ["COMMIT"]).start()
    assert writer.wait(60) == 0
    assert other.execute("SELECT n FROM rows").fetchall() == [(1,)]
