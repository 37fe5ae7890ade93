"""``fedlora plan --epsilon``: a row per budget; and what slow commands say at once."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from opacus.accountants import PRVAccountant
from typer.testing import CliRunner

from fedlora_flwr.cli import app

RUN = ("plan", "digits", "--records", "200", "-c", "num-clients=3", "-c", "delta=1e-3")


def plan(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*RUN, *arguments])
    return result.exit_code, result.stdout


def test_each_budget_has_the_noise_that_spends_it() -> None:
    code, output = plan("--epsilon", "3,1,none", "--json")
    assert code == 0
    one, three, none = json.loads(output)["budgets"]
    assert [found["epsilon"] for found in (one, three, none)] == [1.0, 3.0, None]
    for found in (one, three):
        client = found["clients"][0]
        accountant = PRVAccountant()
        step = (client["noise_multiplier"], client["sample_rate"], found["steps"])
        accountant.history = [step]
        spent = accountant.get_epsilon(1e-3)
        assert found["epsilon"] * 0.97 < spent <= found["epsilon"] * 1.001
    assert none["noise_to_signal"] is None
    assert one["noise_to_signal"] > three["noise_to_signal"] > 0
    assert one["gradients"] is one["duration"] is None


def test_a_row_per_budget_is_shown_and_a_broken_promise_fails() -> None:
    code, output = plan("--epsilon", "3,none")
    assert code == 0
    heads, three, none = output.splitlines()[:3]
    assert re.split("  +", heads.strip())[:3] == ["ε", "δ", "noise multiplier σ"]
    assert re.fullmatch(r" *3 +0\.001 +\d\.\d{3} +\d+\.\d\d +0 of 3", three)
    assert none.split() == ["none", "–", "0.000", "–", "0", "of", "3"]
    code, output = plan("--epsilon", "3,8", "-c", "batch-size=500")
    assert code == 1
    assert re.search(r"^ *8 +0\.001 +impossible +– +3 of 3$", output, re.MULTILINE)
    assert "at ε = 8: Client 0 cannot keep the promise" in " ".join(output.split())


@pytest.mark.parametrize("text", ["3,", "0", "much", "3,-1"])
def test_a_budget_that_is_none_is_refused_before_any_work(text: str) -> None:
    result = CliRunner().invoke(app, [*RUN, "--epsilon", text])
    assert result.exit_code == 1
    assert "cannot be used: expected a number above 0, or none" in " ".join(result.output.split())


def test_on_a_terminal_a_slow_command_says_at_once_that_it_has_begun() -> None:
    code = (
        "import os, pty, sys; "
        "sys.exit(os.waitstatus_to_exitcode(pty.spawn([sys.executable, '-m', 'fedlora_flwr.cli', "
        "*sys.argv[1:]])))"
    )
    command = ("evaluate", "no-such-folder")
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 1
    first, *rest = done.stdout.splitlines()
    assert first == "Loading …"
    assert "no-such-folder" in " ".join(rest)
    piped = CliRunner().invoke(app, command)
    assert "Loading" not in piped.output
