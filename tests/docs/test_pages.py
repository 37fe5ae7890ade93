"""Every block of code in the documentation runs, or says above it why it does not."""

from __future__ import annotations

import re
import shlex
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from tests.docs.pages import DOCS, NAMES, ROOT, Block, Shell, blocks

TUTORIAL = "tutorial.md"
BLOCKS = [block for page in NAMES for block in blocks(page)]
NOT_RUN = [block for block in BLOCKS if block.not_run and block.language != "text"]
RUN = sorted({block.page for block in BLOCKS if not block.not_run} - {TUTORIAL})
# How many blocks are not run, by reason.
REASONS = {
    "docs/index.md does": 1,
    "it installs packages": 4,
    "it takes minutes": 8,
    "it needs code that is not in this repository": 1,
    "it takes a quarter of an hour": 2,
    "it serves until it is stopped": 2,
    "it sends a run to W&B": 1,
    "it needs a device": 1,
    "it needs a fleet": 1,
    "it needs a GPU": 3,
    "it fetches a model": 1,
    "it needs one file of your own": 1,
    "it needs several machines": 1,
    "it takes hours": 16,
    "it takes an hour": 5,
    "the tutorial's records have no such column": 1,
    "tests/deploy/test_docs.py does": 12,
    "tests/deploy/test_fleet.py does": 1,
    "tests/deploy/test_shared_fleet.py does": 1,
    "tests/deploy/test_survives.py does": 2,
    "tests/examples/test_from_python.py does": 1,
    "tests/examples/test_message_api.py does": 1,
    "tests/examples/test_private_loop.py does": 3,
    "tests/simulations/test_flwr_run.py does": 1,
    "tests/simulations/test_killed_runs.py does": 1,
    "tests/tasks/test_own_task.py does": 1,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Follow the tutorial; other pages use its files."""
    folder = tmp_path_factory.mktemp("tutorial")
    Shell(folder).follow(TUTORIAL)
    return folder


def test_the_tutorial_leads_to_an_adapter(finished: Path) -> None:
    runs = [path for path in (finished / "runs").iterdir() if not path.is_symlink()]
    assert len(runs) == 2
    assert all((run / "adapter" / "adapter_model.safetensors").exists() for run in runs)


@pytest.mark.parametrize("page", RUN)
def test_a_page_does_what_it_says(page: str, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    shutil.copytree(finished, folder, symlinks=True)
    Shell(folder).follow(page)


def test_what_is_not_run_says_why() -> None:
    assert Counter(block.not_run for block in NOT_RUN) == REASONS
    others = [reason.removesuffix(" does") for reason in REASONS if reason.endswith(" does")]
    assert [other for other in others if not (ROOT / other).exists()] == []


def test_a_block_has_a_language_that_is_run() -> None:
    known = {"bash", "python", "text", "toml"}
    own = {"deployment.md"}
    assert {block.language for block in BLOCKS if block.page not in own} == known
    assert {block.mark.partition(":")[0] for block in BLOCKS} == {"", "fails", "not run"}


def test_no_command_stands_outside_a_block() -> None:
    command = re.compile(r"^    (?:fedlora|python|pip|make|flwr|ray|export|docker) ", re.M)
    pages = {page: (DOCS / page).read_text("utf-8") for page in NAMES if page != "deployment.md"}
    fenced = {page: re.sub(r"^ *```.*?```$", "", t, flags=re.M | re.S) for page, t in pages.items()}
    assert [page for page, text in fenced.items() if command.search(text)] == []


READ = [
    (block.page, re.sub(r"^(?:[A-Z_]+=\S+ )+", "", command))
    for block in NOT_RUN
    for command in block.commands
    if block.language != "python" and "fedlora " in command and "pip" not in command
]


@pytest.mark.parametrize(("page", "command"), [each for each in READ if "deploy" not in each[1]])
def test_a_command_that_is_not_run_is_read(
    page: str, command: str, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its options exist; and its settings are accepted up to one that is wrong on purpose."""
    monkeypatch.chdir(finished)
    program, verb, *rest = shlex.split(command.replace("RECIPE", "recipe.toml"))
    assert program == "fedlora"
    commands: Any = get_command(app)
    named = commands.commands[verb]
    named.make_context(verb, [*rest])
    if any("-c" in option.opts for option in named.params):  # Else it takes no settings.
        result = CliRunner().invoke(app, [verb, *rest, "-c", "rank=0"])
        assert result.output.startswith("Error: rank = 0 cannot be used"), result.output
    assert len(READ) > 10


def test_code_of_an_example_is_the_examples_own() -> None:
    shown = [block for block in NOT_RUN if "tests/examples/" in block.not_run]
    assert len(shown) == 5
    assert [block.page for block in shown if not in_an_example(block)] == []


def in_an_example(block: Block) -> bool:
    files = (ROOT / "examples").rglob("*.py")
    lines = [line.strip() for line in block.text.splitlines()]
    return any(
        "\n".join(lines) in "\n".join(line.strip() for line in path.read_text("utf-8").splitlines())
        for path in files
    )
