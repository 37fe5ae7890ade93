from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from flwr.app import Message, MessageType, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import ErrorCode

from fedlora_flwr import client_app
from fedlora_flwr.deploy.client_process import app_for
from fedlora_flwr.simulations.app import write_app
from fedlora_flwr.simulations.local_grid import LocalGrid
from tests.deploy.support import packed
from tests.processes.processes import MARK, left_of, marked


def test_the_fleets_app_is_answered_by_the_installed_package(tmp_path: Path) -> None:
    write_app(tmp_path / "app")
    assert app_for(build_fab_from_disk(tmp_path / "app")) is client_app.app


@pytest.mark.parametrize("kind", [MessageType.QUERY, MessageType.TRAIN, MessageType.EVALUATE])
def test_every_message_of_another_app_is_answered_with_the_refusal(kind: str) -> None:
    with LocalGrid(app_for(packed(("evil.py", ""))), 1, {}).running() as grid:
        asked = [Message(RecordDict(), node, kind) for node in grid.get_node_ids()]
        (reply,) = grid.send_and_receive(asked)
    assert reply.error.code == ErrorCode.INVALID_FAB
    assert reply.error.reason == (
        "The app bundle holds files besides its pyproject.toml: 'evil.py'. A device runs the code "
        "that is installed on it and no other: ship the folder operator/app that "
        "`fedlora deploy init` writes."
    )


LOADED = """
import sys
from fedlora_flwr.deploy.client_process import app_for
from fedlora_flwr.deploy.flower import handle_with
print(handle_with(app_for).__module__, *sys.modules)
"""


def test_it_is_flowers_program_without_what_only_a_supernode_needs() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOADED], capture_output=True, text=True, check=True
    )
    program, *loaded = done.stdout.split()
    assert program == "flwr.supernode.cli.flwr_clientapp"
    assert {"sqlalchemy", "alembic"}.isdisjoint(loaded)  # The SuperNode's database.


# One that waits forever, as Flower's does when it wants to tell a SuperNode that is gone, too.
STUCK = """
import threading
from fedlora_flwr.deploy import client_process
client_process.handle_with = lambda load: lambda: threading.Event().wait()
print("ready", flush=True)
client_process.main()
"""
SUPEREXEC = """
import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1], "--parent-pid", str(os.getpid())])
input()
"""


def test_it_ends_with_superexec_even_if_it_is_stuck(tmp_path: Path) -> None:
    mark, pipe = str(tmp_path), subprocess.PIPE
    command, env = [sys.executable, "-c", SUPEREXEC, STUCK], {**os.environ, MARK: mark}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(2.0)
        assert len(marked(mark)) == 2
        process.kill()
    assert left_of(mark, patience=30.0) == []
