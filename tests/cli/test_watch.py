"""``fedlora watch`` on runs that are at work, have ended, and continue."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.cli.watch_page import serving
from fedlora_flwr.cli.watch_screen import WatchedRun, clients_table, screen
from fedlora_flwr.config import RunConfig
from fedlora_flwr.operating_system import try_lock
from fedlora_flwr.server.followed import Followed, Seen
from fedlora_flwr.server.run_dir import RunDirectory
from tests.server.support import digests

EVIL = "evil\x1b[2J"
ENDED = {"status": "completed", "metric": "accuracy", "end": "all rounds are done"}


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "run")
    made.take()
    made.write_config(RunConfig(num_rounds=2, strategy="ffa-lora"))
    made.append("rounds", {"round": 0, "accuracy": 0.5, "seconds": 1.0})
    return made


def write(run_dir: RunDirectory, number: int, **more: Any) -> None:
    for name, spent in (("device-01", 2.0 * number), (EVIL, 3.0 * number)):
        row = {"round": number, "client": name, "epsilon": spent, "epsilon-budget": 8.0}
        run_dir.append("clients", {**row, "seconds": 1.25})
    row = {"round": number, "accuracy": 0.5 + number / 10, "seconds": 1.0, **more}
    run_dir.append("rounds", row)


def test_rows_are_read_once_and_only_whole(run_dir: RunDirectory) -> None:
    followed = Followed(run_dir)
    assert [row["round"] for row in followed.new_rounds()] == [0]
    write(run_dir, 1, failures=["a", "b"], declined=["c"], suspects=["device-01"])
    file = run_dir.path / "rounds.jsonl"
    with file.open("ab") as stream:
        stream.write(b'{"round": 2, "accu')
    assert [row["round"] for row in followed.new_rounds()] == [1]
    assert followed.new_rounds() == []
    assert followed.clients["device-01"].row["epsilon"] == 2.0
    assert time.time() - (followed.clients["device-01"].at or 0) < 60
    assert [*followed.failures] == ["round 1: a", "round 1: b", "round 1: c"]
    assert (followed.failed, followed.suspects) == (2, {"device-01": 1})
    with file.open("ab") as stream:
        stream.write(b'racy": 0.9, "seconds": 1.0}\n')
    assert [row["round"] for row in followed.new_rounds()] == [2]


def test_a_run_that_continues_is_read_again(run_dir: RunDirectory) -> None:
    followed = Followed(run_dir)
    before = run_dir.durable_rows()
    write(run_dir, 1, failures=["a"])
    followed.new_rounds()
    run_dir.rewind(before)
    assert [row["round"] for row in followed.new_rounds()] == [0]
    assert (followed.failed, followed.clients) == (0, {})


def test_the_screen_names_who_has_the_least_left_and_obeys_no_name(run_dir: RunDirectory) -> None:
    write(run_dir, 1, failures=[f"{EVIL} sent nothing"], suspects=[EVIL])
    followed = Followed(run_dir)
    followed.new_rounds()
    lines = screen(followed, RunConfig(num_rounds=2), "accuracy", 80)
    assert "\x1b" not in "\n".join(lines)
    assert lines[:2] == [
        "digits, rolora: round 1 of 2",
        "accuracy 60.0%  1 failed  suspects: evil\ufffd[2J",
    ]
    rows = [line.split() for line in lines if line.startswith(("evil", "device"))]
    assert rows == [
        ["evil\ufffd[2J", "round", "1", "3.00", "5.00", "1.25"],
        ["device-01", "round", "1", "2.00", "6.00", "1.25"],
    ]
    many = {f"d-{n:03}": Seen({"round": 1, "epsilon": "?"}, None) for n in range(50)}
    assert clients_table(many, None)[-1] == "and 30 more clients, which have more left"


def test_a_client_without_budget_is_in_the_table_until_it_takes_part_again(
    run_dir: RunDirectory,
) -> None:
    out = "device-02: its privacy budget is spent, or does not hold this run"
    write(run_dir, 1, declined=[out])
    followed = Followed(run_dir)
    followed.new_rounds()
    lines = screen(followed, RunConfig(num_rounds=2), "accuracy", None)
    heads, first, *_ = lines[3:]
    assert re.split("  +", first.strip()) == [
        "device-02", "declined in round 1", "–", "0 for this run", "–"
    ]  # fmt: skip
    assert heads.startswith("client")
    assert lines[-2:] == ["1 client declined; the last lines:", f"round 1: {out}"]
    run_dir.append("clients", {"round": 2, "client": "device-02", "epsilon": 1.0})
    write(run_dir, 2)
    followed.new_rounds()
    assert followed.declined == {}
    again = Followed(run_dir)
    again.new_rounds()
    assert again.declined == {}


def test_a_run_is_followed_until_it_ends(run_dir: RunDirectory) -> None:
    def work() -> None:
        time.sleep(0.5)
        write(run_dir, 1)
        write(run_dir, 2)
        run_dir.write_summary(ENDED)

    thread = threading.Thread(target=work)
    thread.start()
    result = CliRunner().invoke(app, ["watch", str(run_dir.path)])
    thread.join()
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[:3] == [f"round {n}/2: accuracy {50 + 10 * n}.0%" for n in range(3)]
    assert lines[-1].split(maxsplit=1) == ["Ended", "all rounds are done"]


def old(run_dir: RunDirectory, seconds: float = 3600.0) -> None:
    """Let a run's files look as if nothing had been written for some time."""
    then = time.time() - seconds
    for file in run_dir.path.iterdir():
        os.utime(file, (then, then))


def test_a_killed_run_without_a_summary_is_not_waited_for(run_dir: RunDirectory) -> None:
    write(run_dir, 1)
    work = "import sys, time; from pathlib import Path; "
    work += "from fedlora_flwr.server.run_dir import RunDirectory; "
    work += "run = RunDirectory(Path(sys.argv[1]), resume=True)\n"
    work += "with run.working(): print('at work', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", work, str(run_dir.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        try:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "at work\n"
            old(run_dir)
            assert not run_dir.abandoned()
        finally:
            worker.kill()
    assert run_dir.abandoned()
    before = digests(run_dir.path)
    result = CliRunner().invoke(app, ["watch", str(run_dir.path)])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[:2] == [
        "round 0/2: accuracy 50.0%", "round 1/2: accuracy 60.0%"
    ]  # fmt: skip
    assert result.output.splitlines()[-1].split(maxsplit=1) == [
        "Ended",
        f"without a summary, probably killed; continue it with --resume {run_dir.path}",
    ]
    assert digests(run_dir.path) == before


def test_a_run_that_has_just_written_or_is_of_another_machine_is_waited_for(
    run_dir: RunDirectory,
) -> None:
    assert not run_dir.abandoned()
    old(run_dir)
    assert run_dir.abandoned()
    (run_dir.path / ".claim").write_text("claim\nanother-machine")
    old(run_dir)
    assert not run_dir.abandoned()


def test_a_reader_that_looks_just_now_does_not_keep_a_run_from_going_on(
    run_dir: RunDirectory,
) -> None:
    looking = os.open(run_dir.path / ".claim", os.O_RDONLY)
    assert try_lock(looking, shared=True)
    done = threading.Timer(0.02, os.close, [looking])
    done.start()
    with RunDirectory(run_dir.path, resume=True).working():
        done.join()


def test_a_terminal_shows_a_table_in_place(run_dir: RunDirectory) -> None:
    write(run_dir, 1)
    run_dir.write_summary(ENDED)
    code = (
        "import os, pty, sys; "
        "sys.exit(os.waitstatus_to_exitcode(pty.spawn([sys.executable, '-m', 'fedlora_flwr.cli', "
        "'watch', sys.argv[1]])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_dir.path)],
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "digits, ffa-lora: round 1 of 2" in done.stdout
    assert "budget left" in done.stdout


def test_the_page_is_for_this_machine_alone_and_reloads_until_the_end(
    run_dir: RunDirectory,
) -> None:
    write(run_dir, 1)
    with serving(WatchedRun(run_dir.path).page) as address:
        assert address.startswith("http://127.0.0.1:")
        first = httpx.get(address)
        assert 'http-equiv="refresh" content="5"' in first.text
        assert "50% → 60%" in first.text
        assert httpx.get(f"{address}config.toml").status_code == 404
        assert httpx.get(address, headers={"Host": "evil.example"}).status_code == 403
        assert httpx.post(address).status_code == 501
        write(run_dir, 2)
        run_dir.write_summary(ENDED)
        second = httpx.get(address)
        assert "50% → 70%" in second.text
        assert 'http-equiv="refresh"' not in second.text
    with pytest.raises(httpx.ConnectError):
        httpx.get(address)


def test_a_folder_without_a_run_is_told(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["watch", str(tmp_path)])
    assert result.exit_code == 1
    assert "expected the folder of a run, with config.toml, or of a comparison" in " ".join(
        result.output.split()
    )
