from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.config import RunConfig, read_toml
from fedlora_flwr.config.convert import is_flat, with_sections
from fedlora_flwr.config.recipes import RECIPES, load_recipe, recipe_names

FLAT = """# A recipe of mine.
# In two lines.
task = "digits"  # what
epsilon = 3.0

# Why this rate.
lr-a = 0.1  # ours
rank = 8
lora-targets = '''
blocks'''
delta=0.001
# The end.
"""
WITH_SECTIONS = """# A recipe of mine.
# In two lines.
[task]
task = "digits"  # what

[lora]
rank = 8
lora-targets = '''
blocks'''

[training]
# Why this rate.
lr-a = 0.1  # ours

[privacy]
epsilon = 3.0
delta =0.001
# The end.
"""


def test_a_converted_recipe_keeps_every_value_and_comment(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(FLAT)
    before = load_recipe(str(path))
    done = CliRunner().invoke(app, ["convert", str(path)])
    assert done.exit_code == 0, done.output
    assert path.read_text() == WITH_SECTIONS
    assert load_recipe(str(path)) == before
    assert "means the same as before" in done.output.replace("\n", " ")
    again = CliRunner().invoke(app, ["convert", str(path)])
    assert "has sections already" in again.output.replace("\n", " ")
    assert path.read_text() == WITH_SECTIONS


def test_a_methods_table_and_a_mixture_are_kept(tmp_path: Path) -> None:
    path, target = tmp_path / "mine.toml", tmp_path / "new.toml"
    path.write_text("\ufeffseed = 3\nprivacy.epsilon = 2.0\n# Drawn.\n[as-lora]\nexplore = 0.1\n")
    done = CliRunner().invoke(app, ["convert", str(path), "--output", str(target)])
    assert done.exit_code == 0, done.output
    assert is_flat(path)
    assert not is_flat(target)
    assert tomllib.loads(target.read_text()) == {
        "as-lora": {"explore": 0.1},
        "privacy": {"epsilon": 2.0},
        "run": {"seed": 3},
    }
    assert "# Drawn.\nexplore" in target.read_text()


@pytest.mark.parametrize("content", ["epsilonn = 3.0\n", "epsilon = \n", None])
def test_what_cannot_be_read_is_not_written(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "mine.toml"
    if content is not None:
        path.write_text(content)
    done = CliRunner().invoke(app, ["convert", str(path)])
    assert done.exit_code == 1
    assert "Error: " in done.output
    assert (path.read_text() if path.exists() else None) == content


def test_a_recipe_without_sections_is_read_and_said_to_be_so(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(FLAT.replace("lora-targets = '''\nblocks'''\n", ""))
    done = CliRunner().invoke(app, ["plan", str(path), "--json"])
    assert done.exit_code == 0, done.output
    assert f"fedlora convert {path}" in done.stderr.replace("\n", "")
    assert "convert" not in done.stdout


@pytest.mark.parametrize("name", recipe_names())
def test_the_packages_recipes_have_sections(name: str) -> None:
    path = RECIPES / f"{name}.toml"
    assert not is_flat(path)
    assert with_sections(path) == path.read_text(encoding="utf-8")
    assert RunConfig.of(read_toml(path)) == load_recipe(name)
