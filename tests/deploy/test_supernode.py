from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.supercore.superexec.executor import SubprocessExecutor

from fedlora_flwr.deploy import flower
from fedlora_flwr.deploy.fleet import Fleet, make_fleet
from fedlora_flwr.deploy.flower import CLIENT, SUPEREXEC, SUPERNODE, NotSealed, OtherFlower
from fedlora_flwr.deploy.supernode import (
    START,
    check_script,
    installed_code,
    sealed,
    start_supernode,
    write_programs,
)
from fedlora_flwr.errors import InvalidValue

ENVIRONMENT = Path(sys.executable).parent
REAL = {CLIENT, SUPEREXEC, SUPERNODE}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "device").mkdir()
    write_programs(tmp_path / "device" / "bin")
    return tmp_path / "device" / "bin"


@pytest.fixture
def env(own: Path) -> dict[str, str]:
    """Return what a device's processes know where Flower's own programs come first."""
    path = (str(ENVIRONMENT), os.environ["PATH"], "", ".")
    return sealed({**os.environ, "PATH": os.pathsep.join(path)}, own)


def test_every_program_of_flowers_is_the_devices_own(own: Path, env: dict[str, str]) -> None:
    names = flower.programs().keys()
    assert (ENVIRONMENT / CLIENT).exists()
    assert flower.started_by_superexec() <= names
    assert {shutil.which(name, path=env["PATH"]) for name in names} == {
        str(own / name) for name in names
    }
    assert all(Path(entry).is_absolute() for entry in env["PATH"].split(os.pathsep))
    assert env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"


def test_a_program_that_vanishes_is_missing_and_not_flowers(own: Path, env: dict[str, str]) -> None:
    (own / CLIENT).unlink()
    assert shutil.which(CLIENT, path=env["PATH"]) is None
    with pytest.raises(NotSealed, match="flwr-clientapp would be missing"):
        sealed(env, own)


def test_superexec_starts_what_is_in_the_devices_folder(own: Path, env: dict[str, str]) -> None:
    """Of all kinds of processes only a client's does anything."""
    kinds = flower.started_by_superexec()
    assert {CLIENT, "flwr-agentapp", "flwr-serverapp"} <= kinds
    for name in flower.programs().keys() - REAL:
        done = subprocess.run([name], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert f"This device starts no {name}: " in done.stderr


def test_a_clients_process_imports_nothing_from_where_it_is_started(
    env: dict[str, str], tmp_path: Path
) -> None:
    for name in ("fedlora_flwr/__init__.py", "flwr.py", "runpy.py", "sitecustomize.py"):
        (tmp_path / "cwd" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cwd" / name).write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    subprocess.run([CLIENT, "--try"], env=env, cwd=tmp_path / "cwd", check=True)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "argument", ["--isolation", "--isol=process", "--allow-runtime-dependency-installation", "--al"]
)
def test_an_argument_that_lets_other_code_run_is_refused(
    tmp_path: Path, argument: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "execve")  # Or the process of this test would become a SuperNode.
    with pytest.raises(InvalidValue, match="let a server's code run"):
        start_supernode(tmp_path, ["--superlink", "127.0.0.1:1", argument])
    assert not (tmp_path / "bin").exists()


def test_a_folder_that_cannot_be_on_the_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    write_programs(tmp_path / "a:b" / "bin")
    with pytest.raises(NotSealed, match="without ':'"):
        sealed(os.environ, tmp_path / "a:b" / "bin")


class ByPath(SubprocessExecutor):
    def launch(self, spec: object) -> object:  # type: ignore[override]
        executor = sys.modules[SubprocessExecutor.__module__]
        return executor.subprocess.Popen([f"{ENVIRONMENT}/{CLIENT}", "--token"])


class Elsewhere(SubprocessExecutor):
    def launch(self, spec: object) -> object:  # type: ignore[override]
        return None


@pytest.mark.parametrize("executor", [ByPath, Elsewhere])
def test_a_flower_that_starts_clients_in_another_way_is_refused(
    executor: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[SubprocessExecutor.__module__]
    before = module.subprocess
    monkeypatch.setattr(module, "SubprocessExecutor", executor)
    with pytest.raises(OtherFlower, match=r"cannot be kept from running .* install flwr 1\.42"):
        flower.started_by_superexec()
    assert module.subprocess is before


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("import flwr.cli.install as m; del m.install_from_fab", "has no install_from_fab"),
        ("import flwr.clientapp.utils as m; del m.get_load_client_app_fn", "has no get_load"),
        ("import flwr.supernode.runtime.run_clientapp", "does not use install_"),
    ],
)
def test_a_flower_that_loads_apps_in_another_way_is_refused(fault: str, said: str) -> None:
    code = f"{fault}; from fedlora_flwr.deploy.client_process import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "--try"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]


def by_flower(text: str) -> str:
    return text.replace(START, "flower-supernode")


def commented(text: str) -> str:
    return text.replace(f"exec {START}", f"# exec {START} \nexec flower-supernode")


def started_before(text: str) -> str:
    return text.replace("exec ", "/opt/venv/bin/flower-supernode &\nexec ")


@pytest.mark.parametrize("edit", [by_flower, commented, started_before, lambda text: ""])
def test_a_script_that_goes_past_the_package_is_found(
    tmp_path: Path, edit: Callable[[str], str]
) -> None:
    make_fleet(tmp_path / "fleet", Fleet(1))
    script = tmp_path / "fleet" / "devices" / "device-01" / "start.sh"
    check_script(script)
    script.write_text(edit(script.read_text()))
    with pytest.raises(NotSealed, match="a server's code would run"):
        check_script(script)


def test_a_device_says_which_code_it_would_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_fleet(tmp_path / "fleet", Fleet(1))
    device = tmp_path / "fleet" / "devices" / "device-01"
    before = sorted(device.iterdir())
    monkeypatch.setenv("PATH", str(ENVIRONMENT))
    assert installed_code(device / "start.sh") == Path(flower.__file__).parents[1]
    assert sorted(device.iterdir()) == before
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotSealed, match="would start nothing instead of"):
        installed_code(device / "start.sh")
