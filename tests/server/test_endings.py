"""Each run says how it ended, repeats from its recipe, and leaves other runs' folders alone."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.cli.run_screen import how_to_continue, next_steps, what_is_kept
from fedlora_flwr.config import RunConfig
from fedlora_flwr.files import FileTrouble
from fedlora_flwr.server.rounds import RoundRow
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import prepare_run, run_in_process
from tests.conftest import QUICK, MakeConfig
from tests.processes.processes import MARK, left_of, marked
from tests.server.support import digests, only_run

FEDLORA = str(Path(sys.executable).parent / "fedlora")
SHORT = [part for key, value in QUICK.items() for part in ("-c", f"{key}={json.dumps(value)}")]
ENDLESS = [*SHORT, "-c", "num-rounds=100000", "-c", "epsilon=inf"]


def fedlora(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), "interrupted"), (SystemExit(1), "interrupted"), (OSError(5), "failed")],
    ids=["interrupt", "exit", "error"],
)
def test_a_summary_tells_an_interrupt_from_a_failure(
    error: BaseException, status: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    run_dir = RunDirectory(tmp_path / "run")

    def on_round(row: RoundRow) -> None:
        if row["round"] == 1:
            raise error

    with pytest.raises(type(error)):
        run_in_process(prepare_run(make_config()), run_dir, on_round)
    summary = run_dir.summary()
    assert summary is not None
    assert (summary["status"], summary["rounds_done"]) == (status, 1)
    assert summary["error"].startswith(type(error).__name__)


RECORDED = """
import os, signal, sys, typer
from pathlib import Path
from fedlora_flwr.config import RunConfig
from fedlora_flwr.server.endings import recorded
from fedlora_flwr.server.rounds import RoundRow
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.terminal import guard

def work():
    run_dir = RunDirectory(Path(sys.argv[1]))
    with recorded(run_dir, RunConfig()):
        run_dir.append("rounds", {"round": 0})
        run_dir.append("rounds", {"round": 1, "epsilon_max": 0.5})
        exec(sys.argv[2])

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(lambda: guard(work))
app(args=[])
"""


@pytest.mark.parametrize(
    ("end", "status", "rounds"),
    [
        ("os.kill(os.getpid(), signal.SIGTERM)", "interrupted", 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", "interrupted", None),
        ("os._exit(0)", "interrupted", None),
        ("raise ValueError('why')", "failed", 1),
        ("run_dir.write_summary({'status': 'completed'}); os._exit(0)", "completed", None),
    ],
)
def test_a_summary_is_there_whatever_ends_the_process(
    end: str, status: str, rounds: int | None, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    environment = {**os.environ, MARK: str(folder)}
    command = [sys.executable, "-c", RECORDED, str(folder), end]
    subprocess.run(command, env=environment, capture_output=True, check=False)
    assert left_of(str(folder)) == []
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == status
    assert summary.get("rounds_done") == rounds
    assert {path.name for path in folder.iterdir()} == {".claim", "rounds.jsonl", "summary.json"}


def test_the_first_trouble_is_shown_and_not_the_second(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    run_dir, moved = RunDirectory(tmp_path / "run"), tmp_path / "moved"

    def block(row: RoundRow) -> None:
        """Let nothing be written any more after the first row, neither adapter nor summary."""
        if row["round"] == 0:
            run_dir.path.rename(moved)
            run_dir.path.touch()

    with pytest.raises(FileTrouble, match="/run/adapter cannot be used: a file is in the way"):
        run_in_process(prepare_run(make_config()), run_dir, block)
    assert json.loads((moved / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert not (moved / "summary.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("simulate", "--output", "{file}"),
        ("simulate", "--output", "{file}/below"),
        ("simulate", "-c", "run-dir={file}"),
        ("simulate", "-c", "state-dir={file}"),
        ("simulate", "--output", "/proc/fedlora"),
        ("simulate", "-c", "state-dir=/proc/fedlora"),
        ("inspect-split", "digits", "--output", "/proc/fedlora.png"),
        ("compare", "--strategies", "ffa-lora", "--seeds", "1", "--output", "{file}"),
        ("deploy", "init", "/proc/fedlora", "--devices", "1"),
    ],
)
def test_trouble_with_a_folder_is_one_sentence_that_names_it(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    filled = [argument.format(file=tmp_path / "file") for argument in arguments]
    if arguments[0] in ("simulate", "compare"):
        filled += SHORT
    code, output = fedlora(*filled)
    assert code == 1
    (line,) = (line for line in output.splitlines() if line.startswith("Error: "))
    assert str(tmp_path / "file") in line or "/proc/fedlora" in line
    assert "cannot be used: " in line
    assert "Traceback" not in output


def test_a_run_repeats_from_the_recipe_that_it_wrote(tmp_path: Path) -> None:
    assert fedlora("simulate", *SHORT, "--output", str(tmp_path / "first"))[0] == 0
    first = only_run(tmp_path / "first")
    before = digests(first)
    recipe = str(first / "config.toml")
    assert fedlora("simulate", recipe, "--output", str(tmp_path / "second"))[0] == 0
    second = only_run(tmp_path / "second")
    assert digests(first) == before
    assert adapter(first) == adapter(second)
    assert (second / "config.toml").read_bytes() == (first / "config.toml").read_bytes()
    # Another run is refused before it works or writes.
    code, output = fedlora("simulate", recipe, "-c", f"run-dir={first}")
    assert code == 1
    assert "a folder that no other run has written to" in output
    assert digests(first) == before


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Return a folder for temporary files, of a short name, as Ray has sockets in it."""
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def started(tmp_path: Path, temporary: Path) -> Iterator[Any]:
    """Return a function that starts the command on a run without end, and waits for a file."""
    processes = []

    def start(*arguments: str, wait_for: str) -> tuple[subprocess.Popen[str], Path]:
        output = tmp_path / "runs"
        process = subprocess.Popen(
            [sys.executable, "-m", "fedlora_flwr.cli", *arguments, "--output", str(output)],
            env={**os.environ, MARK: str(tmp_path), "TMPDIR": str(temporary)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
        while not list(output.glob(f"2*/{wait_for}")):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        return process, only_run(output)

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_a_simulation_that_is_asked_to_end_does(started: Any, tmp_path: Path) -> None:
    process, run = started("simulate", *ENDLESS, "--workers", "2", wait_for="adapter")
    process.send_signal(signal.SIGTERM)
    lines = process.communicate()[0].splitlines()
    assert lines[-1] == "Interrupted."
    assert any(line.startswith("Kept      ") for line in lines)
    assert process.returncode == 143
    assert left_of(str(tmp_path)) == []
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"


@pytest.mark.flower
def test_a_run_that_is_ended_in_set_up_leaves_nothing_but_its_summary(
    started: Any, tmp_path: Path, temporary: Path
) -> None:
    process, run = started("run", *ENDLESS, wait_for="run.log")
    process.send_signal(signal.SIGHUP)
    process.communicate()
    assert process.returncode == 129
    assert left_of(str(tmp_path)) == []
    assert list(temporary.iterdir()) == []
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["rounds_done"]) == ("interrupted", 0)


@pytest.mark.flower
def test_a_run_that_is_killed_stops_training(started: Any, tmp_path: Path, temporary: Path) -> None:
    process, run = started("run", *ENDLESS, "--workers", "1", wait_for="clients.jsonl")
    # The command, keepers, SuperLink, its helpers, the simulation, Ray's daemons and worker.
    assert len(marked(str(tmp_path))) > 10
    process.kill()
    process.communicate()
    assert left_of(str(tmp_path)) == []
    before = digests(run)
    assert list(temporary.glob("fedlora-*")) == []
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    assert digests(run) == before


def test_a_runs_last_lines_name_the_card_and_commands_that_work(
    finished: tuple[RunConfig, RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run_dir = finished
    here = Path(sys.executable).parent
    monkeypatch.setenv("PATH", "/usr/bin")  # An environment that is not activated.
    lines = dict(next_steps(config, run_dir))
    assert lines["Adapter"] == f"{run_dir.adapter}, and its README.md says how to use it"
    assert lines["Report"] == f"{run_dir.path / 'report.html'}, for a browser"
    assert lines["Next"] == f"{here / 'fedlora'} plot {run_dir.path}"
    done = subprocess.run(lines["Next"], shell=True, capture_output=True, text=True)
    assert (done.returncode, (run_dir.path / "rounds.png").exists()) == (0, True), done.stderr
    released = dict(next_steps(replace(config, reproducible=False), run_dir))
    assert released["Next"] == f"{here / 'fedlora'} evaluate {run_dir.path}"
    assert released[""] == f"{here / 'fedlora'} predict {run_dir.path} FILE"
    assert released["Publish"] == f"{here / 'hf'} upload OWNER/NAME {run_dir.adapter}"
    assert "has seen the sum of their ε" in released["Repeats"]
    monkeypatch.setenv("PATH", f"/usr/bin:{here}")
    assert dict(next_steps(config, run_dir))["Next"] == f"fedlora plot {run_dir.path}"


def test_only_a_private_run_that_learned_is_to_be_published(
    finished: tuple[RunConfig, RunDirectory],
) -> None:
    config, run_dir = finished
    config = replace(config, reproducible=False)
    public = dict(next_steps(replace(config, epsilon=math.inf), run_dir))
    assert public["Warning"] == "This adapter is not private. Do not publish it."
    assert "evaluate" in public["Next"]
    assert public.keys().isdisjoint({"Publish", "Repeats"})
    summary = run_dir.summary()
    assert summary is not None
    run_dir.write_summary({**summary, "final_accuracy": summary["initial_accuracy"]})
    failed = dict(next_steps(config, run_dir))
    assert failed["Next"].endswith(f"plan {run_dir.path / 'config.toml'}")
    assert "look at the line Noise" in failed[""]
    assert "-c epsilon=inf" in failed[""]
    assert "upload" not in "".join(failed.values())
    free = dict(next_steps(replace(config, epsilon=math.inf), run_dir))
    assert "although it had no noise" in free[""]
    # A smaller loss is better.
    told = {**summary, "metric": "loss", "initial_loss": 2.0}
    for final, learned in ((1.0, True), (3.0, False)):
        run_dir.write_summary({**told, "final_loss": final})
        assert ("Publish" in dict(next_steps(config, run_dir))) is learned


def test_an_interrupted_run_says_what_is_kept_and_how_to_continue(
    finished: tuple[RunConfig, RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run_dir = finished
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    lines = dict(what_is_kept("simulate", run_dir))
    assert lines["Resume"] == f"fedlora simulate --resume {run_dir.path}"
    rounds = f"{config.num_rounds} of {config.num_rounds} rounds in {run_dir.path}"
    assert lines["Kept"].startswith(rounds)
    assert lines["Kept"].endswith("counts as spent")
    empty = RunDirectory(tmp_path / "empty")
    assert what_is_kept("run", empty) == [
        ("Kept", "nothing to continue from, because no round was finished")
    ]
    assert how_to_continue("run", empty) == ""
