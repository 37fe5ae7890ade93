from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import fedlora_flwr

ROOT = Path(__file__).parents[1]


def python(code: str) -> str:
    """Run code in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_imports_point_in_one_direction() -> None:
    """The contracts are in pyproject.toml."""
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [str(linter), "--no-cache"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


HEAVY = ("torch", "peft", "opacus", "timm", "transformers")


@pytest.mark.parametrize(
    "module",
    [
        "fedlora_flwr",
        "fedlora_flwr.strategies",
        "fedlora_flwr.clients.bridge",
        "fedlora_flwr.simulations.local_grid",
        "fedlora_flwr.config",
    ],
)
def test_a_server_does_not_load_what_it_does_not_need(module: str) -> None:
    loaded = python(f"import sys, {module}; print(*[m for m in {HEAVY} if m in sys.modules])")
    assert loaded == ""


def test_the_help_of_the_command_loads_neither_numpy_nor_flower() -> None:
    """Both take longer to load than all of the rest."""
    others = (*HEAVY, "numpy", "pandas", "flwr", "ray")
    code = f"import sys, fedlora_flwr.cli; print(*[m for m in {others} if m in sys.modules])"
    assert python(code) == ""


def test_the_trainer_does_not_load_flower() -> None:
    loaded = python("import sys, fedlora_flwr.clients.trainer; print('flwr' in sys.modules)")
    assert loaded == "False"


def test_every_public_name_exists() -> None:
    assert fedlora_flwr.__all__
    for name in set(fedlora_flwr.__all__) - {"__version__"}:
        assert getattr(fedlora_flwr, name).__name__ == name


def test_the_stub_is_made_of_the_one_list_of_names() -> None:
    stub = Path(fedlora_flwr.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    assert stub == fedlora_flwr._stub() + "\n"


def test_the_version_is_that_of_the_installed_package() -> None:
    assert fedlora_flwr.__version__ == version("fedlora-flwr")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = fedlora_flwr.no_such_name  # type: ignore[attr-defined]


def test_the_package_does_not_import_its_benchmarks() -> None:
    package = Path(fedlora_flwr.__file__).parent
    texts = {path.name: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    assert [name for name, text in texts.items() if "import benchmarks" in text] == []
    assert [name for name, text in texts.items() if "from benchmarks" in text] == []
