"""Checks of app bundles: a device serves one only if it has no code and names this package."""

from __future__ import annotations

import tomllib
import zipfile
from collections.abc import Mapping
from io import BytesIO
from typing import Any

from fedlora_flwr.errors import OrderRefused
from fedlora_flwr.simulations.app import COMPONENTS, PACKAGE, PROJECT_FILE

MAX_BUNDLE, MAX_PROJECT = 2**20, 2**18
"""Most bytes of a bundle, and of the file in it. Honest ones have about 2,000."""
_MANIFEST = ".info/CONTENT"  # Flower writes it into every bundle.
_PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_SHOWN = 3
_PROJECT_KEYS = {"name", "version", "description", "license"}
_WHAT_TO_DO = (
    "A device runs the code that is installed on it and no other: ship the folder operator/app "
    "that `fedlora deploy init` writes."
)


class BundleRefused(OrderRefused):
    """An app bundle holds, or asks for, something other than the installed package.

    Parameters
    ----------
    what : str
        What is in the bundle, as the second half of a sentence.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"The app bundle {what}. {_WHAT_TO_DO}")
        self.what = what

    def __reduce__(self) -> tuple[type[BundleRefused], tuple[str]]:
        """Rebuild from the argument, so that the error crosses processes."""
        return type(self), (self.what,)


def check_bundle(content: bytes) -> None:
    """Refuse an app bundle that carries code, or that names other code than the package's.

    Nothing is unpacked to the disk, and nothing is imported.

    Parameters
    ----------
    content : bytes
        The bundle, a zip archive, as the server sent it.

    Raises
    ------
    BundleRefused
        It is more than a ``pyproject.toml`` with the package's two components and a run config.
    """
    if len(content) > MAX_BUNDLE:
        raise BundleRefused(f"has {len(content):,} bytes, and {MAX_BUNDLE:,} are allowed")
    try:
        app = _app_table(_project(content))
        _expect("tool.flwr.app", app, {"publisher", "components", "config"})
        if app.get("components") != COMPONENTS:
            named = _shown(app.get("components"))
            raise BundleRefused(f"names the components {named}, and not this package's two")
    except BundleRefused:
        raise
    except Exception as error:  # A damaged archive raises errors of many kinds.
        raise BundleRefused(f"cannot be read ({type(error).__name__})") from error


def _project(content: bytes) -> dict[str, Any]:
    """Read the one file that a bundle may hold."""
    with zipfile.ZipFile(BytesIO(content)) as archive:
        _check_names(archive)
        text = _read(archive)
    return tomllib.loads(text.decode("utf-8"))


def _check_names(archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    foreign = [name for name in names if name not in (PROJECT_FILE, _MANIFEST)]
    if foreign:
        more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
        listed = ", ".join(_shown(name) for name in foreign[:_SHOWN])
        raise BundleRefused(f"holds files besides its {PROJECT_FILE}: {listed}{more}")
    if names.count(PROJECT_FILE) != 1 or names.count(_MANIFEST) > 1:
        raise BundleRefused(f"does not hold exactly one {PROJECT_FILE}")


def _read(archive: zipfile.ZipFile) -> bytes:
    entry = archive.getinfo(PROJECT_FILE)
    if entry.compress_type not in _PACKINGS:
        raise BundleRefused(f"packs its {PROJECT_FILE} in a way that Flower does not")
    with archive.open(entry) as file:
        # The size in the archive's directory is the sender's word.
        text = file.read(MAX_PROJECT + 1)
    if len(text) > MAX_PROJECT:
        raise BundleRefused(f"has a {PROJECT_FILE} of more than {MAX_PROJECT:,} bytes")
    return text


def _app_table(project: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``[tool.flwr.app]``. Beside it, only plain facts about the project are allowed."""
    _expect("", project, {"project", "tool"})
    facts = project.get("project", {})
    _expect("project", facts, {*_PROJECT_KEYS, "dependencies"})
    dependencies = facts.get("dependencies", [])
    if dependencies not in ([], [PACKAGE]):
        raise BundleRefused(f"asks for the dependencies {_shown(dependencies)}")
    for key in _PROJECT_KEYS & facts.keys():
        if not isinstance(facts[key], str):
            raise BundleRefused(f"has a project.{key} that is not a text: {_shown(facts[key])}")
    tool = project.get("tool", {})
    _expect("tool", tool, {"flwr"})
    flower = tool.get("flwr", {})
    _expect("tool.flwr", flower, {"app"})
    app: Mapping[str, Any] = flower.get("app", {})
    return app


def _expect(table: str, found: object, keys: set[str]) -> None:
    if not isinstance(found, Mapping):
        raise BundleRefused(f"has a {table} in its {PROJECT_FILE} that is not a table")
    if other := sorted(found.keys() - keys):
        prefix = f"{table}." if table else ""
        raise BundleRefused(f"says {_shown(prefix + other[0])} in its {PROJECT_FILE}")


def _shown(value: object) -> str:
    """Write a value of the sender's in at most 80 printable characters of one line."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
