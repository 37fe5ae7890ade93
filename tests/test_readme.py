"""Every command of the README, in a shell in which no environment is activated."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.support.readme import BIN, FLOWER, README, ROOT, unactivated

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
    # tests/deploy/test_docs.py makes a fleet and starts it.
    "deploy init": (["--port", "0"], "Error: port = 0 cannot be used"),
    "deploy check": ([], f"Error: folder = '{ROOT}/fleet' cannot be used"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_works_where_no_environment_is_activated(command: str) -> None:
    program, verb, *rest = shlex.split(command)
    if verb == "deploy":
        verb = f"{verb} {rest[0]}"
    added, beginning = ENDS[verb]
    done = subprocess.run(
        [str(BIN / Path(program).name), *shlex.split(command)[1:], *added],
        env=unactivated(), cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = done.stderr if beginning.startswith("Error") else done.stdout
    assert said.startswith(beginning), done.stdout + done.stderr
    assert done.returncode == beginning.startswith("Error"), done.stderr


def test_no_command_of_the_readme_is_left_out() -> None:
    """Each is run here, by test_flwr_run, or is one of the two that run this very suite."""
    fenced = re.sub(r"```.*?```", "", README, flags=re.S)
    shown = [line.strip() for line in re.findall(r"^    (\S.*)$", fenced, re.M)]
    own = ("make run ", "make test ", "export ", "flwr run . ", ".venv/bin/")
    known = (*own, "fleet/server/start.sh ")  # As tests/deploy/test_docs.py starts it.
    output = ("Privacy ", "…", "Accuracy ", "Sent ")
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
