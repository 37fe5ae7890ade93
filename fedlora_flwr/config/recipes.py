"""Recipes: run configurations in files, including those that come with the package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlora_flwr.config import RunConfig, parse_overrides, read_toml
from fedlora_flwr.config.names import given_key, short_name
from fedlora_flwr.errors import InvalidValue, unknown

RECIPES = Path(__file__).with_name("recipes")
_PATHS = ("model", "weights", "dataset")
# What each recipe is for, in the order in which a newcomer needs them.
_FOR = {
    "digits": "start here",
    "sst2-minilm": "texts",
    "cifar10-small-swin": "pictures",
    "chat": "language model",
    "llm-benchmark": "language model",
    "digits-secure-sum": "secure sum",
    "sst2-minilm-secure-sum": "secure sum",
    "cifar10-swin-secure-sum": "secure sum",
}
_PAPER, _OTHER = "paper", "other"


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package, e.g. ``paper/ffa-lora-mnli``.

    Those that a newcomer needs come first, and those of papers last.
    """
    found = (path.relative_to(RECIPES).with_suffix("") for path in RECIPES.rglob("*.toml"))
    order = [*_FOR]

    def rank(name: str) -> tuple[bool, int, str]:
        return "/" in name, order.index(name) if name in _FOR else len(order), name

    return sorted((path.as_posix() for path in found), key=rank)


def purpose_of(name: str) -> str:
    """Return what a recipe of the package is for, in a word or two."""
    return _FOR.get(name, _PAPER if name.startswith(f"{_PAPER}/") else _OTHER)


def about_recipe(name: str) -> str:
    """Return the description of a recipe of the package: the first line of its file."""
    first = (RECIPES / f"{name}.toml").read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("# ")


def load_recipe(name: str, overrides: list[str] | None = None) -> RunConfig:
    """Load a recipe by name or path; overrides (``key=value``) replace its values.

    Raises
    ------
    InvalidValue
        There is no such recipe, or a value of the recipe or an override cannot be used.
    """
    return _with_changes(name, parse_overrides(overrides or []))


def _with_changes(name: str, changes: Mapping[str, Any]) -> RunConfig:
    names = recipe_names()
    if not name.endswith(".toml") and name not in names:
        raise unknown("recipe", name, names, after=", or a path that ends in .toml")
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    config = RunConfig.of(read_toml(path), changes)
    located: dict[str, Any] = {key: _located(getattr(config, key)) for key in _PATHS}
    return replace(config, **located)


def config_of(recipe: str | Path | RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Return a recipe's configuration with changes, as functions in Python take them.

    Parameters
    ----------
    recipe : str, Path or RunConfig
        A recipe's name, a TOML file, or a configuration.
    changes : Mapping[str, Any]
        Values by key. In a key without a dot, underscores stand for dashes. A `Path` becomes an
        absolute path.

    Raises
    ------
    InvalidValue
        There is no such recipe, or a key or a value cannot be used.
    """
    values = {given_key(name): value for name, value in changes.items()}
    for key, value in values.items():
        if isinstance(value, Path):
            values[key] = str(value.expanduser().resolve())
        elif short_name(key) in _PATHS and isinstance(value, str):
            values[key] = _located(value)
    if isinstance(recipe, RunConfig):
        return RunConfig.of(recipe.items(), values) if values else recipe
    return _with_changes(str(recipe), values)


def config_file(run: Path) -> Path:
    """Return the absolute path of the configuration in a run's folder.

    Raises
    ------
    InvalidValue
        No run has begun in the folder.
    """
    found = run.expanduser().resolve() / "config.toml"
    if not found.exists():
        raise InvalidValue("resume", str(run), "the folder of a run that has begun")
    return found


def _located(text: str) -> str:
    """Return the absolute path of an existing file or folder; any other text is unchanged.

    The absolute path is the same for every process of a run.
    """
    path = Path(text).expanduser()
    return str(path.resolve()) if text and path.exists() else text
