"""What every command has: help, a version, completion, JSON, and tables for pipes."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete
from typer.main import get_command
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.keys import fields_by_key
from fedlora_flwr.config.names import full_name
from fedlora_flwr.config.recipes import recipe_names
from fedlora_flwr.places import FLOWERS
from fedlora_flwr.strategies import STRATEGIES, strategy_class
from tests.cli.documented import fields

DEFAULTS = RunConfig().items()
CLI: Any = get_command(app)


def fedlora(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


def commands(group: Any = CLI, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the words of each command."""
    for name, command in group.commands.items():
        yield (*before, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*before, name))


@pytest.mark.parametrize("words", [(), *commands()], ids=" ".join)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_has_help(words: tuple[str, ...], option: str) -> None:
    output = fedlora(*words, option)
    assert "Usage: " in output
    assert "--help" in output


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_help_explains_every_argument_and_option(words: tuple[str, ...]) -> None:
    command = CLI
    for word in words:
        command = command.commands[word]
    shown = re.sub(r"[^!-~\w]+", " ", fedlora(*words, "--help"))
    for parameter in command.params:
        assert parameter.help, f"{parameter.name} has no help"
        first_words = " ".join(parameter.help.split()[:4])
        assert re.sub(r"[^!-~\w]+", " ", first_words) in shown


def test_the_version_is_that_of_the_package() -> None:
    assert fedlora("--version") == f"fedlora-flwr {version('fedlora-flwr')}\n"


@pytest.mark.parametrize(
    ("arguments", "incomplete", "expected"),
    [
        ([], "comp", ["compare"]),
        ([], "pre", ["predict", "pretrain"]),
        ([], "me", ["merge"]),
        ([], "sh", ["sharpness"]),
        (["evaluate", "-c"], "label-", ["label-column=", "label-shares="]),
        (["deploy"], "", ["init", "check", "status", "renew", "run", "start", "serve", "identity"]),
        (["run"], "dig", ["digits", "digits-secure-sum"]),
        (["simulate"], "paper/ffa-lora-s", ["paper/ffa-lora-sst2"]),
        (["compare", "--task"], "cif", ["cifar10-small-swin", "cifar10-swin-secure-sum"]),
        (["deploy", "check", "--recipe"], "sst", ["sst2-minilm", "sst2-minilm-secure-sum"]),
        (["run", "-c"], "client-", ["client-ranks=", "client-threads="]),
        (["plan", "-c"], "filter=b", ["filter=binomial"]),
        (["plan", "-c"], "strategy=ro", ["strategy=rolora"]),
        (["plan", "-c"], "task=dig", ["task=digits"]),
        (["plan", "-c"], "partitioner=iid", ["partitioner=iid"]),
        (["plan", "-c"], "rslora=t", ["rslora=true"]),
        (["plan", "-c"], "no-such-key=t", []),
        (["compare", "--strategies"], "dp-lora,ffa", ["dp-lora,ffa-lora", "dp-lora,ffa-seeds"]),
        (["compare", "--row"], "la-lora fil", ["la-lora filter="]),
        (["compare", "--row"], "la", ["la-lora"]),
        (["compare", "--baselines"], "al", ["all"]),
        (["compare", "--sampler"], "o", ["optuna"]),
        (["run", "-c"], "trackers=t", ["trackers=tensorboard"]),
        (["compare", "--baselines"], "head-only,no-p", ["head-only,no-privacy"]),
        (["keys"], "lr-h", ["lr-head"]),
    ],
)
def test_a_shell_completes(arguments: list[str], incomplete: str, expected: list[str]) -> None:
    asked = ShellComplete(CLI, {}, "fedlora", "_FEDLORA_COMPLETE")
    found = [item.value for item in asked.get_completions(arguments, incomplete)]
    assert sorted(found) == sorted(expected)


def test_bash_is_answered_by_the_command_itself() -> None:
    asked = {
        "_FEDLORA_COMPLETE": "complete_bash",
        "COMP_WORDS": "fedlora run dig",
        "COMP_CWORD": "2",
    }
    done = subprocess.run(
        [sys.executable, "-m", "fedlora_flwr.cli"],
        env={**os.environ, **asked}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["digits", "digits-secure-sum"]


def own_settings() -> dict[str, object]:
    """Return the settings of strategies that have tables of their own."""
    return {
        f"{name}.{key}": entry.default
        for name in (*STRATEGIES, *FLOWERS)
        for key, entry in fields_by_key(strategy_class(name).settings).items()
        if key not in DEFAULTS
    }


def test_in_a_pipe_keys_and_recipes_are_a_row_per_line() -> None:
    lines = fedlora("keys").splitlines()
    named = [line.split()[:2] for line in lines]
    known = (*DEFAULTS, *own_settings())
    assert named == [["section", "key"], *(full_name(key).split(".") for key in known)]
    column = lines[0].index("meaning")
    assert all(line[column - 1] == " " != line[column] for line in lines)
    lines = fedlora("recipes", "--all").splitlines()
    first, *others = recipe_names()
    assert [line.split()[0] for line in lines] == ["recipe", first, "FILE.toml", *others]
    short = fedlora("recipes").splitlines()
    papers = [name for name in others if name.startswith("paper/")]
    assert papers
    kept = [name for name in others if name not in papers]
    assert [line.split()[0] for line in short] == ["recipe", first, "FILE.toml", *kept, "paper/…"]
    assert f"{len(papers)} more, which --all lists." in short[-1]


def test_recipes_are_in_the_order_in_which_a_newcomer_needs_them() -> None:
    listed = json.loads(fedlora("recipes", "--json"))
    purposes = [*dict.fromkeys(entry["for"] for entry in listed)]
    order = ["start here", "texts", "pictures", "language model", "secure sum", "paper"]
    assert purposes == order
    assert "docs/how_to/bring_my_data.md" in fedlora("recipes")
    papers = [entry["recipe"] for entry in listed if entry["for"] == "paper"]
    assert papers == sorted(papers)


def test_a_key_is_explained_in_full() -> None:
    first, second = fedlora("keys", "filter", "exact-passes").split("\n\n")
    assert [line.split()[0] for line in first.splitlines()] == [
        "Key", "Meaning", "Default", "Type", "Allowed", "Decides",
    ]  # fmt: skip
    assert "none, binomial, laplacian, ema, doppler" in first
    assert "on a device: run." in first
    assert "default there: true" in second
    assert all(name in fedlora("keys", "strategy") for name in STRATEGIES)


def test_an_unknown_key_names_the_near_ones_first() -> None:
    result = CliRunner().invoke(app, ["keys", "rank", "lr"])
    assert result.exit_code == 1
    start = "Error: key or section = 'lr' cannot be used: did you mean 'lr-a', 'lr-b', 'lr-head', "
    assert result.stderr.startswith(start)
    assert result.stdout == ""


def test_json_of_keys_recipes_and_a_budget() -> None:
    found = {entry["key"]: entry for entry in json.loads(fedlora("keys", "--json"))}
    defaults = {key: entry["default"] for key, entry in found.items()}
    known = {**DEFAULTS, **own_settings()}
    # JSON has no infinity.
    assert defaults == {key: None if value == math.inf else value for key, value in known.items()}
    assert found["strategy"]["names"] == [*STRATEGIES, *FLOWERS]
    (one,) = json.loads(fedlora("keys", "lr-a", "--json"))
    assert one == found["lr-a"]
    assert set(one) == fields("keys")
    listed = json.loads(fedlora("recipes", "--json"))
    assert [entry["recipe"] for entry in listed] == recipe_names()
    assert all(set(entry) == fields("recipes") and entry["about"] for entry in listed)
    numbers = [
        "--epsilon",
        "3",
        "--delta",
        "1e-5",
        "--records",
        "11228",
        "--batch-size",
        "128",
        "--steps",
        "10",
    ]
    found = json.loads(fedlora("budget", *numbers, "--json"))
    assert set(found) == fields("budget")
    assert found["epsilon"]["prv"] <= 3


def test_json_of_a_plan_and_of_a_split(tmp_path: Path) -> None:
    found = json.loads(fedlora("plan", "digits", "--records", "200", "--json", "-c", "epsilon=inf"))
    assert set(found) == fields("plan")
    assert found["epsilon"] is None
    path = tmp_path / "split.png"
    found = json.loads(fedlora("inspect-split", "--json", "--output", str(path)))
    assert set(found) == fields("inspect-split")
    assert path.exists()
    assert len(found["clients"]) == 10
    for client in found["clients"]:
        assert sum(client["by_class"].values()) == client["records"]
        assert client["batch_within_n"] == (client["records"] >= 32)


def test_with_json_progress_goes_to_stderr_alone(tmp_path: Path) -> None:
    small = ["num-rounds=1", "local-steps=1", "num-clients=2", "partitioner=iid", "epsilon=inf"]
    settings = [part for pair in small for part in ("-c", pair)]
    command = ["simulate", "--json", "--output", str(tmp_path), *settings]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads(
        (tmp_path / "latest" / "summary.json").read_text(encoding="utf-8")
    )
    assert "round 1/1: accuracy" in result.stderr
    assert "Results   " in result.stderr
    assert "Privacy   none\n" in result.stderr
    assert "inf" not in result.stderr.replace("epsilon = inf adds no noise", "")


def test_what_is_wrong_leaves_stdout_empty_for_a_script() -> None:
    result = CliRunner().invoke(app, ["plan", "digit", "--json"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "did you mean 'digits' or" in result.stderr


def test_a_reader_who_has_had_enough_is_no_error() -> None:
    command = f"{sys.executable} -m fedlora_flwr.cli keys | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout.split()[0], done.stderr) == ("section", "")
