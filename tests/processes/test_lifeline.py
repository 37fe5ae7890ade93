"""What a process has started ends with it, and what it wanted to leave behind is there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.processes.processes import MARK, gathered, left_of, marked

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="daemons are found on Linux only")

# A child, a daemon whose parent is gone, and a process that wants to live, each of its own session.
FAMILY = """
import os, signal, subprocess, sys, time
sleep = "import time; time.sleep(600)"
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-c", sleep])
    os._exit(0)
subprocess.Popen([sys.executable, "-c", sleep])
open(sys.argv[1], "w").close()
time.sleep(600)
"""

# Works under `guard`, as every command does.
PARENT = """
import os, sys, time, typer
from pathlib import Path
from fedlora_flwr.processes.lifeline import Lifeline
from fedlora_flwr.terminal import guard

folder, how = Path(sys.argv[1]), sys.argv[2]
app = typer.Typer(pretty_exceptions_enable=False)

def work():
    with Lifeline() as lifeline:
        ready = folder / "ready"
        command = (sys.executable, "-c", {family!r}, str(ready))
        lifeline.start(command, clear=folder / "scratch")
        lifeline.start(last_words=(folder / "words", "killed"))
        while not ready.exists():
            time.sleep(0.01)
        (folder / "begun").touch()
        if how == "error":
            raise ZeroDivisionError
        if how == "exit":
            sys.exit(5)
        if how == "os._exit":
            os._exit(6)
        time.sleep(600)

app.command()(lambda: guard(work))
app(args=[])
"""


def start(folder: Path, how: str = "") -> tuple[subprocess.Popen[bytes], str]:
    (folder / "scratch").mkdir()
    (folder / "scratch" / "file").touch()
    mark = str(folder)
    # Not a pipe, which whoever is left would hold open.
    with (folder / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", PARENT.format(family=FAMILY), str(folder), how],
            env={**os.environ, MARK: mark},
            stderr=errors,
        )
    while not (folder / "begun").exists():
        assert process.poll() is None
        time.sleep(0.01)
    return process, mark


def check_gone(folder: Path, mark: str) -> None:
    assert left_of(mark, patience=10) == []
    assert not (folder / "scratch").exists()
    assert (folder / "words").read_text() == "killed"


@pytest.mark.parametrize(
    ("signs", "code"),
    [
        ((signal.SIGINT,), 130),
        ((signal.SIGTERM,), 143),
        ((signal.SIGHUP,), 129),
        ((signal.SIGINT, signal.SIGINT), 130),
        ((signal.SIGTERM, signal.SIGHUP, signal.SIGINT), None),
        ((signal.SIGKILL,), -signal.SIGKILL),
    ],
    ids=lambda value: "-".join(s.name for s in value) if isinstance(value, tuple) else "",
)
def test_nothing_outlives_a_process_that_a_signal_ends(
    signs: tuple[signal.Signals, ...], code: int | None, tmp_path: Path
) -> None:
    process, mark = start(tmp_path)
    # Parent, two keepers, and the family of four.
    assert len(gathered(mark, 7)) == 7
    for sign in signs:
        process.send_signal(sign)
        time.sleep(0.01)
    process.wait()
    assert code is None or process.returncode == code
    if signs[0] != signal.SIGKILL:
        assert (tmp_path / "errors").read_text() == "Interrupted.\n"
        # A last signal may come when the command has done its work and handles none any more.
        assert process.returncode > 128 or -process.returncode in signs[2:]
    check_gone(tmp_path, mark)


@pytest.mark.parametrize(("how", "code"), [("error", 1), ("exit", 5), ("os._exit", 6)])
def test_nothing_outlives_a_process_that_ends_itself(how: str, code: int, tmp_path: Path) -> None:
    process, mark = start(tmp_path, how)
    process.wait()
    assert process.returncode == code
    check_gone(tmp_path, mark)


# Who makes a temporary folder, and works until it is killed.
MAKERS = {
    "scratch": "from fedlora_flwr.processes.lifeline import scratch\nmade = scratch()",
    "operator": """
from pathlib import Path
from fedlora_flwr.config import RunConfig
from fedlora_flwr.deploy.fleet import Fleet, make_fleet
from fedlora_flwr.deploy.operator import Operator
make_fleet(Path(sys.argv[1]) / "fleet", Fleet(1, port=1), RunConfig(task="digits"))
made = Operator(Path(sys.argv[1]) / "fleet", False, print)
""",
}


@pytest.mark.parametrize("maker", MAKERS)
def test_no_temporary_folder_outlives_a_killed_process(tmp_path: Path, maker: str) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    code = f"import sys, time\n{MAKERS[maker]}\nwith made:\n    print('in')\n    time.sleep(600)"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(temporary), MARK: str(tmp_path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"in\n"
    assert len(list(temporary.iterdir())) == 1
    process.kill()
    process.wait()
    assert left_of(str(tmp_path), patience=30) == []
    assert list(temporary.iterdir()) == []


def test_a_keeper_takes_its_command_with_it(tmp_path: Path) -> None:
    process, mark = start(tmp_path)
    (keeper,) = (p for p in children(process.pid) if children(p))
    # The daemon is the keeper's child, too, and has none.
    (command,) = (p for p in children(keeper) if children(p))
    os.kill(keeper, signal.SIGKILL)
    while command in marked(mark):
        time.sleep(0.01)
    # The command's family is nobody's now.
    for left in marked(mark):
        os.kill(left, signal.SIGKILL)
    process.wait()


def children(process: int) -> list[int]:
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(child) for child in text.split()]


def test_a_keeper_is_deaf_to_what_ends_others_and_gives_its_commands_code(tmp_path: Path) -> None:
    code = textwrap.dedent("""
        import os, signal, subprocess, sys
        from fedlora_flwr.processes.lifeline import Lifeline
        # Its input is empty, so that it cannot wait for somebody to type.
        command = "import sys; print(1, flush=True); sys.exit(sys.stdin.read() or 3)"
        with Lifeline() as lifeline:
            keeper = lifeline.start((sys.executable, "-c", command), stdout=subprocess.PIPE)
            keeper.stdout.readline()
            for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(keeper.pid, sign)
            print(keeper.wait(), lifeline.start(("no-such-program",)).wait())
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "127"]
    assert "no-such-program" in done.stderr


def test_ignored_signals_stay_ignored() -> None:
    code = textwrap.dedent("""
        import os, signal
        from fedlora_flwr.terminal import guard
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # As nohup does.
        guard(lambda: os.kill(os.getpid(), signal.SIGHUP))
        print("went on")
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "went on\n"


def test_clearing_up_is_not_cut_short_and_a_later_signal_counts() -> None:
    code = textwrap.dedent("""
        import os, signal, typer
        from fedlora_flwr.terminal import guard, uninterrupted

        def work():
            with uninterrupted():
                for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    os.kill(os.getpid(), sign)
                print("cleared up", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            print("not reached")

        app = typer.Typer()
        app.command()(lambda: guard(work))
        app(args=[])
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 143
    assert (done.stdout, done.stderr) == ("cleared up\n", "Interrupted.\n")


def test_a_signal_waits_for_a_process_that_starts_and_ctrl_c_does_not_reach_it() -> None:
    code = textwrap.dedent("""
        import os, signal, subprocess, sys, typer
        from fedlora_flwr.terminal import guard, held

        child = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('lived', flush=True)"

        def work():
            with held():
                os.kill(os.getpid(), signal.SIGINT)
                subprocess.run([sys.executable, "-c", child], check=True)
                print("started", flush=True)
            print("not reached")

        app = typer.Typer()
        app.command()(lambda: guard(work))
        app(args=[])
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert (done.stdout, done.stderr) == ("lived\nstarted\n", "Interrupted.\n")
