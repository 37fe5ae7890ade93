"""`make setup`: uv installs what pip would, from where pip would."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools.install import pip_settings, uv_settings

ROOT = Path(__file__).parents[1]
PIPS = "uv did not install the packages, so pip does."


def make_wheel(folder: Path, version: str) -> None:
    """Write a wheel of a package with one module that holds nothing."""
    info = f"tiny_thing-{version}.dist-info"
    texts = {
        "tiny_thing.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny-thing\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"tiny_thing-{version}-py3-none-any.whl", "w") as wheel:
        for name, text in texts.items():
            wheel.writestr(name, text)


@pytest.fixture
def pip_file(tmp_path: Path) -> Path:
    """Write pip's settings for a folder of wheels, two releases of which one is allowed."""
    wheels, allowed, file = tmp_path / "wheels", tmp_path / "allowed.txt", tmp_path / "pip.conf"
    wheels.mkdir()
    for version in ("1.5", "2.0"):
        make_wheel(wheels, version)
    allowed.write_text("tiny-thing<2\n")
    found = f"find-links =\n    {tmp_path / 'empty'}\n    {wheels}"
    (tmp_path / "empty").mkdir()
    file.write_text(f"[global]\nno-index = true\n[install]\n{found}\nconstraint = {allowed}\n")
    return file


def install(pip_file: Path, folder: Path, **env: str) -> str:
    """Install into a folder, with pip's settings and nothing else of this machine's."""
    kept = {name: value for name, value in os.environ.items() if name[:4] not in {"PIP_", "UV_C"}}
    command = (sys.executable, "-m", "tools.install", "--target", folder, "tiny-thing")
    told = {**kept, "PIP_CONFIG_FILE": str(pip_file), **env}
    done = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True, check=True)
    return done.stdout


def test_uv_installs_from_where_pip_would_and_within_its_constraints(
    pip_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("uv", reason="pip has set up this environment")
    assert install(pip_file, tmp_path / "one") == ""
    assert (tmp_path / "one" / "tiny_thing-1.5.dist-info" / "INSTALLER").read_text() == "uv"


@pytest.mark.parametrize(("forbidden", "compiled"), [("", 0), ("1", 1)])
def test_modules_are_compiled_where_python_may_not_keep_what_it_compiles(
    forbidden: str, compiled: int, pip_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("uv", reason="pip has set up this environment, and compiles all modules")
    install(pip_file, tmp_path / "one", PYTHONDONTWRITEBYTECODE=forbidden)
    assert len(list((tmp_path / "one").rglob("tiny_thing.*.pyc"))) == compiled


def test_pip_installs_where_uv_cannot(pip_file: Path, tmp_path: Path) -> None:
    said = install(pip_file, tmp_path / "one", UV_INDEX_STRATEGY="no such strategy")
    assert said.startswith(PIPS)
    made = (tmp_path / "one" / "tiny_thing-1.5.dist-info" / "INSTALLER").read_text()
    assert made.strip() == "pip"


def test_the_environment_of_a_shell_stands_above_a_file_and_install_above_global() -> None:
    said = """:env:.index-url='third'
global.index-url='first'
install.index-url='second'
install.timeout='9'
freeze.timeout='1'
global.extra-index-url='one two'
"""
    assert uv_settings(pip_settings(said)) == {
        "UV_DEFAULT_INDEX": "third",
        "UV_HTTP_TIMEOUT": "9",
        "UV_INDEX": "one two",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }
