"""Every command of the README, in a shell in which no environment is activated."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent
# As they stand above `flwr run`: tests/simulations/test_flwr_run.py runs these lines.
FLOWER = re.findall(r"^    (?:export|flwr) .*$", README, re.M)
COMMANDS = re.findall(r"^    (\.venv/bin/.*?)(?: +#.*)?$", README, re.M)
# What a command gets beside the README's own words, and the beginning of what it then says. A long
# one is given a value that is refused when all else has been read: test_flwr_run and test_own_task
# let `simulate` and `run` finish in such a shell.
BAD = (["-c", "rank=0"], "Error: rank = 0 cannot be used")
ENDS: dict[str, tuple[list[str], str]] = {
    "simulate": BAD,
    "run": BAD,
    "plan": BAD,
    "inspect-split": BAD,
    "compare": BAD,
    "keys": ([], "key "),
    "recipes": ([], "recipe "),
    "budget": ([], "noise multiplier σ = "),
}


def unactivated(**more: str) -> dict[str, str]:
    """Return an environment that knows nothing of this project's programs."""
    kept = ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "PYTHONPATH", "OMP_NUM_THREADS")
    base = {name: os.environ[name] for name in kept if name in os.environ}
    return {**base, "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", **more}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_works_where_no_environment_is_activated(command: str) -> None:
    program, verb, *rest = shlex.split(command)
    added, beginning = ENDS[verb]
    done = subprocess.run(
        [str(BIN / Path(program).name), verb, *rest, *added],
        env=unactivated(), cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = done.stderr if beginning.startswith("Error") else done.stdout
    assert said.startswith(beginning), done.stdout + done.stderr
    assert done.returncode == beginning.startswith("Error"), done.stderr


def test_no_command_of_the_readme_is_left_out() -> None:
    """Each is run here, by test_flwr_run, or is one of the two that run this very suite."""
    fenced = re.sub(r"```.*?```", "", README, flags=re.S)
    shown = [line.strip() for line in re.findall(r"^    (\S.*)$", fenced, re.M)]
    known = ("make run ", "make test ", "export ", "flwr run . ", ".venv/bin/")
    output = (
        "Task ",
        "Strategy ",
        "Clients ",
        "Privacy ",
        "…",
        "Accuracy ",
        "Sent ",
        "noise ",
        "77%",
    )
    assert [line for line in shown if not line.startswith((*known, *output))] == []
    assert len(FLOWER) == 3


def test_the_two_commands_are_targets_that_need_no_environment() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "run", "test"],
        env=unactivated(), cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ".venv/bin/fedlora run digits" in done.stdout
    assert ".venv/bin/python -m pytest" in done.stdout


def test_flower_is_told_what_our_own_runs_tell_it() -> None:
    from fedlora_flwr.simulations.superlink import QUIET

    told = dict(word.split("=", 1) for line in FLOWER[:2] for word in shlex.split(line)[1:])
    assert told.pop("PATH") == "$PWD/.venv/bin:$PATH"
    assert told.items() <= QUIET.items()
    assert {name for name in QUIET if name.startswith("FLWR_")} <= told.keys()
