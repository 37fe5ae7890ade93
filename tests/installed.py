"""What an environment with some extras holds, and a process that cannot import anything else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedlora_flwr.errors import EXTRAS

ROOT = Path(__file__).parents[1]
OWNERS = packages_distributions()
"""The distributions that each module comes from."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Asked for such a module, Python finds nothing: no error is raised that would not be raised anyway.
_BLOCK = """
import json, sys
from importlib.machinery import PathFinder

class Absent(PathFinder):
    modules = set(json.loads(sys.argv[1]))

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        gone = name.partition(".")[0] in cls.modules
        return None if gone else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Absent
"""


def named_by(*extras: str) -> list[str]:
    """Return the requirements of the core, without an argument, or of extras."""
    if not extras:
        return list(PROJECT["dependencies"])
    return [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]


def distributions(requirements: list[str]) -> set[str]:
    """Return all distributions that pip installs for requirements, by what they say of themselves.

    Those that are not installed here are counted by name alone.
    """
    found: set[str] = set()
    todo = [Requirement(line) for line in requirements]
    seen: set[str] = set()
    while todo:
        wanted = todo.pop()
        if (key := f"{canonicalize_name(wanted.name)}{sorted(wanted.extras)}") in seen:
            continue
        seen.add(key)
        found.add(canonicalize_name(wanted.name))
        try:
            lines = requires(wanted.name) or []
        except PackageNotFoundError:
            continue
        for needed in map(Requirement, lines):
            extras = [{"extra": extra} for extra in ("", *wanted.extras)]
            if needed.marker is None or any(map(needed.marker.evaluate, extras)):
                todo.append(needed)
    return found


def modules_of(distributions: set[str]) -> set[str]:
    """Return the modules of `EXTRAS` that are in some distributions."""
    names = {module for modules in EXTRAS.values() for module in modules}
    return {
        module
        for module in names
        if any(canonicalize_name(owner) in distributions for owner in OWNERS.get(module, [module]))
    }


def absent_with(*extras: str) -> list[str]:
    """Return the modules of `EXTRAS` that an environment with core and extras has not."""
    there = modules_of(distributions([*named_by(), *(named_by(*extras) if extras else [])]))
    return sorted({module for modules in EXTRAS.values() for module in modules} - there)


def run_with(*extras: str, code: str, cwd: Path) -> str:
    """Run code in a fresh process that has the core and extras, and return what it prints.

    In the code, ``Absent.modules`` is the set of modules that cannot be imported.
    """
    done = subprocess.run(
        [sys.executable, "-c", _BLOCK + code, json.dumps(absent_with(*extras))],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_DATA_HOME": str(cwd / "data")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
