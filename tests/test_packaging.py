"""What is handed to others: a wheel, an archive of the sources, Flower's app bundle, images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from flwr.common.constant import FAB_INCLUDE_PATTERNS, FAB_MAX_SIZE
from flwr.supercore import constant as hub

from fedlora_flwr.deploy.fleet import Fleet, make_fleet
from fedlora_flwr.simulations.superlink import QUIET

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
DEPENDENCIES = sysconfig.get_path("purelib")
# Folders whose modules come with the package but are no part of a Flower app.
NOT_IN_A_BUNDLE = {"tests", "benchmarks", "runs"}


def call(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def package_files() -> set[str]:
    """Return every file of the package as the source tree has it."""
    files = (ROOT / "fedlora_flwr").rglob("*")
    return {
        str(f.relative_to(ROOT)) for f in files if f.is_file() and f.parent.name != "__pycache__"
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build wheel and archive with the project's own build system, and the bundle with Flower's."""
    folder = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    call(BIN / "flwr", "build", "--app", ROOT, cwd=folder, FLWR_DISABLE_UPDATE_CHECK="1")
    return folder


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_the_wheel_holds_the_whole_package_and_nothing_beside_it(built: Path) -> None:
    with zipfile.ZipFile(only(built, "*.whl")) as wheel:
        names = set(wheel.namelist())
    info = {name for name in names if ".dist-info/" in name}
    assert names - info == package_files()
    assert {"fedlora_flwr/py.typed", "fedlora_flwr/config/recipes/digits.toml"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in info)


def test_the_archive_builds_the_same_wheel(built: Path, tmp_path: Path) -> None:
    with tarfile.open(only(built, "*.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    source = only(tmp_path, "fedlora_flwr-*")
    assert {path.name for path in source.iterdir()}.isdisjoint({"runs", ".venv", ".git"})
    assert [path.name for path in source.rglob("*") if path.stat().st_size > 100_000] == []
    call(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=source)
    first, second = (only(folder, "*.whl") for folder in (built, tmp_path))
    with zipfile.ZipFile(first) as one, zipfile.ZipFile(second) as two:
        assert {f.filename: f.CRC for f in one.infolist()} == {
            f.filename: f.CRC for f in two.infolist()
        }


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel, with this environment's dependencies but without its source tree."""
    environment = tmp_path_factory.mktemp("installed") / "venv"
    call(sys.executable, "-m", "venv", "--without-pip", environment, cwd=built)
    inner = environment / Path(DEPENDENCIES).relative_to(sys.prefix)
    # A path in a .pth file is not itself searched for others, such as that of an editable install.
    (inner / "dependencies.pth").write_text(DEPENDENCIES + "\n")
    offline = ("--no-deps", "--no-index", "--ignore-installed", "--disable-pip-version-check")
    pip = (sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "install")
    call(*pip, *offline, only(built, "*.whl"), cwd=built)
    return environment


def test_the_installed_wheel_runs_the_laptop_recipe(installed: Path, tmp_path: Path) -> None:
    python = installed / "bin" / "python"
    ask = "import fedlora_flwr, sys; print(fedlora_flwr.__file__, *sys.path, sep='\\n')"
    home, *paths = call(python, "-P", "-c", ask, cwd=tmp_path, PYTHONPATH="").split("\n")
    assert Path(home).is_relative_to(installed)
    assert str(ROOT) not in paths

    command = ("simulate", "digits", "-c", "num-rounds=1", "-c", "num-clients=3", "--json")
    said = call(installed / "bin" / "fedlora", *command, cwd=tmp_path, PYTHONPATH="")

    assert json.loads(said)["status"] == "completed"
    latest = tmp_path / "runs" / "latest"
    assert len((latest / "rounds.jsonl").read_text().splitlines()) == 2
    assert (latest / "adapter" / "adapter_model.safetensors").exists()


@pytest.fixture(scope="module")
def bundle(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    with zipfile.ZipFile(only(built, "*.fab")) as archive:
        archive.extractall(folder)
    return folder


def test_the_bundle_is_within_the_limits_of_flowers_hub(built: Path, bundle: Path) -> None:
    files = [path for path in bundle.rglob("*") if path.is_file() and path.name != "CONTENT"]
    suffixes = {PurePosixPath(pattern).suffix for pattern in FAB_INCLUDE_PATTERNS} - {""}
    other = {path.relative_to(bundle).as_posix() for path in files if path.suffix not in suffixes}
    assert other == {"LICENSE"}
    assert only(built, "*.fab").stat().st_size < FAB_MAX_SIZE == 10 * 2**20
    assert max(path.stat().st_size for path in files) <= hub.MAX_FILE_BYTES
    assert len(files) <= hub.MAX_FILE_COUNT
    for path in files:
        path.read_text(encoding="utf-8")
        assert len(path.relative_to(bundle).parts) <= hub.MAX_DIR_DEPTH
    project: dict[str, Any] = tomllib.loads((bundle / "pyproject.toml").read_text())["project"]
    assert 0 < len(project["description"]) <= 200
    assert len(project["name"]) <= hub.MAX_NAME_LENGTH
    assert "Apache License" in (bundle / project["license-files"][0]).read_text()


def test_the_bundle_is_the_app_and_no_more(bundle: Path) -> None:
    inside = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    wanted = {
        name for name in package_files()
        if name.endswith((".py", ".toml")) and NOT_IN_A_BUNDLE.isdisjoint(Path(name).parts)
    }  # fmt: skip
    assert inside - {".info/CONTENT"} == {*wanted, "pyproject.toml", "README.md", "LICENSE"}


def test_the_bundles_apps_load_from_the_bundle_alone(bundle: Path) -> None:
    code = (
        "import fedlora_flwr.server_app as s, fedlora_flwr.client_app as c;"
        " import fedlora_flwr.config.recipes as r;"
        " print(s.__file__, c.__file__, len(r.recipe_names()), sep='\\n')"
    )
    # Without site (-S) no .pth file is read, so the editable install is out of sight.
    path = os.pathsep.join((str(bundle), DEPENDENCIES))
    server, client, recipes = call(
        sys.executable, "-S", "-P", "-c", code, cwd=bundle, PYTHONPATH=path
    ).split()
    assert Path(server).is_relative_to(bundle)
    assert Path(client).is_relative_to(bundle)
    assert int(recipes) > 30


def instructions() -> list[tuple[str, str]]:
    """Read the container file: each instruction with its arguments, in one line."""
    text = (ROOT / "containers" / "Containerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1].strip()) for line in whole if line.strip()]


def arguments(name: str) -> list[str]:
    return [text for instruction, text in instructions() if instruction == name]


def documented(command: str) -> str:
    """Return the one line of the deployment page that has a command."""
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    (line,) = [line.strip() for line in page.splitlines() if command in line]
    return line


def test_an_image_is_built_from_the_wheel_that_the_documented_command_makes(built: Path) -> None:
    folder = documented("--wheel-dir").split("--wheel-dir")[1].split()[0]
    build = documented("docker build")
    assert build.split("docker build")[1].split(";")[0].split()[-1] == folder
    for text in arguments("COPY"):
        *sources, _ = text.split()
        assert [only(built, source).suffix for source in sources] == [".whl"]
    assert arguments("ADD") == []
    assert "--file containers/Containerfile" in build
    stages = {text.split(" AS ")[1] for text in arguments("FROM")}
    assert stages - {"package"} == set(build.split("for part in")[1].split(";")[0].split())
    for line in arguments("RUN"):
        subprocess.run(["sh", "-nc", line], check=True)


def test_a_container_runs_what_the_fleets_scripts_run(tmp_path: Path) -> None:
    make_fleet(tmp_path / "fleet", Fleet(1))
    (mounted,) = arguments("VOLUME")
    assert [mounted] == arguments("WORKDIR")
    (entry,) = (json.loads(text) for text in arguments("ENTRYPOINT"))
    script = Path(entry[0]).relative_to(mounted)
    for part, folder in (("superlink", "server"), ("supernode", "devices/device-01")):
        own = tmp_path / "fleet" / folder / script
        assert os.access(own, os.X_OK)
        (program,) = [line.split()[1] for line in own.read_text().splitlines() if "exec " in line]
        # Both go through this package, which closes gaps of Flower's programs.
        assert program == "fedlora"
        assert program in {point.name for point in entry_points(group="console_scripts")}
        run = documented(f":/srv{':ro' if part == 'supernode' else ''} fedlora-{part}")
        assert f"/{Path(folder).name}:{mounted}" in run
    assert arguments("EXPOSE") == [str(Fleet(1).port)]


def test_an_image_has_no_root_no_secrets_and_keeps_quiet() -> None:
    names = [name for name, _ in instructions()]
    assert arguments("USER") not in ([], ["root"], ["0"])
    assert names.index("RUN") < names.index("USER") < names.index("ENTRYPOINT")
    told = dict(word.split("=", 1) for text in arguments("ENV") for word in text.split())
    assert {key: value for key, value in QUIET.items() if key.startswith("FLWR_")}.items() <= (
        told.items()
    )
    assert set(told) - set(QUIET) == {"PATH", "HOME"}
    assert {text.split("=")[0] for text in arguments("ARG")} == {"BASE", "EXTRAS", "TORCH"}
