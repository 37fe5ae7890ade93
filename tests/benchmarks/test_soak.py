"""The soak in small, and how it finds processes and what they hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import soak
from benchmarks.marked import MARK, by_kind, handles, holders
from benchmarks.soak_fleet import SENT

WAITS = "import sys; file = open(sys.argv[1]); print('ready', flush=True); sys.stdin.read()"


def test_a_process_is_found_by_its_mark_and_by_what_it_holds(tmp_path: Path) -> None:
    held = tmp_path / "held"
    held.touch()
    command = [sys.executable, "-c", WAITS, str(held), "flower-supernode"]
    pipe, env = subprocess.PIPE, {**os.environ, MARK: str(tmp_path)}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert by_kind(str(tmp_path)) == {"SuperNode": [process.pid]}
        assert str(held) in handles(process.pid)
        assert holders(tmp_path) == [process.pid]
        process.communicate()
    assert by_kind(str(tmp_path)) == {}
    assert handles(process.pid) == []
    assert holders(tmp_path) == []


def test_what_a_supernode_logs_of_its_answers_is_counted() -> None:
    lines = [
        "[RUN 1]", "Receiving: train message (ID: a)", "Received successfully",
        "[RUN 1]", "Sending: train message (ID: b)", "Sent successfully",
        "[RUN 1]", "Sending: query message (ID: c)", "Sent successfully",
        "[RUN 1]", "Sending: train message (ID: d)", "Failed to send message d: gone",
        "[RUN 2]", "Sending: train message (ID: e)", "", "Sent successfully",
    ]  # fmt: skip
    assert len(SENT.findall("\n".join(lines))) == 2


@pytest.mark.flower
def test_a_run_that_is_killed_twice_equals_one_that_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "soak.json"
    small = ("--rounds", "4", "--clients", "2", "--kills", "2")
    with pytest.raises(SystemExit) as ended:
        soak.main(["--part", "simulation", *small, "--output", str(file)])
    result = json.loads(file.read_text())["simulation"]
    assert ended.value.code == 0, result
    assert all(result["checks"].values())
    assert not any(result["left over"].values())
    assert sum(result["starts"].values()) >= 2
    assert len(result["most open handles by tenth of the rounds"]) > 1
    assert "Left over" in capsys.readouterr().out
