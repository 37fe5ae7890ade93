"""Start a device's SuperNode so that it runs only the code that is installed on the device."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import fedlora_flwr
from fedlora_flwr.deploy import flower, ports
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.files import replacing
from fedlora_flwr.simulations.superlink import QUIET

COMMAND = "fedlora"
START = f"{COMMAND} deploy start"
SCRIPT = "start.sh"
"""A device's script, which names its server and hands over to `START`."""
BIN = "bin"
OTHER_PORT = f"start this device with another port: {ports.NODE_PORT}=9510 ./{SCRIPT}"
CLIENT_PROCESS = "fedlora_flwr.deploy.client_process"
PROCESSES = {
    flower.SUPERNODE: "fedlora_flwr.deploy.node_process",
    flower.SUPEREXEC: "fedlora_flwr.deploy.superexec_process",
    flower.CLIENT: CLIENT_PROCESS,
}
"""The package's own modules in place of Flower's programs."""
# Argparse also accepts abbreviations of these options.
_UNSAFE = ("--isolation", "--allow-runtime-dependency-installation")
_REFUSAL = (
    "This device starts no {name}: it answers with the fedlora_flwr that is installed on it and "
    "with nothing else. Ask the server's operator what this run is for."
)


def start_supernode(folder: Path, arguments: Sequence[str]) -> NoReturn:
    """Become a SuperNode that can only reach the replacements of Flower's programs in ``bin``.

    Parameters
    ----------
    folder : Path
        The device's folder. Its ``bin`` is written again.
    arguments : sequence of str
        The arguments for ``flower-supernode``.

    Raises
    ------
    InvalidValue
        An argument lets other code run.
    NotSealed
        Flower's own programs would be found before, or beside, those in ``bin``.
    OtherFlower
        The installed version of Flower starts clients in another way.
    NotAdmitted
        The server refuses this device, or is another one.
    PortTaken
        Another program listens on the port that the SuperNode needs on this machine.
    """
    _check_arguments(arguments)
    _check_port(folder, arguments)
    check_flower(os.environ)
    try:
        write_programs(folder / BIN)
    except OSError as error:
        raise flower.NotSealed(
            f"{folder / BIN} cannot be written ({error.strerror})",
            "start this device as the user who owns the folder",
        ) from error
    env = sealed(os.environ, folder / BIN)
    _ask_server(folder, arguments)
    ports.claim(folder / BIN)
    program = folder / BIN / flower.SUPERNODE
    os.execve(program, [flower.SUPERNODE, *arguments], env)  # noqa: S606


def _check_port(folder: Path, arguments: Sequence[str]) -> None:
    fix = OTHER_PORT
    if ports.claimed(folder / BIN):
        fix = "this device's SuperNode is running already, so there is no need to start it"
    ports.require_free(arguments, fix)


def _ask_server(folder: Path, arguments: Sequence[str]) -> None:
    from fedlora_flwr.deploy.admission import Caller, NoAnswer

    if caller := Caller.of(arguments, folder):
        try:
            caller.ask()
        except NoAnswer as error:  # Devices may start before their server.
            print(f"{error} This device keeps trying.", file=sys.stderr, flush=True)


def installed_code(script: Path) -> Path:
    """Check that a device's start script runs only the installed package, and return its folder.

    Nothing is started, and nothing in the device's folder is changed.

    Parameters
    ----------
    script : Path
        The device's ``start.sh``.

    Raises
    ------
    NotSealed
        The script starts Flower by itself, or the environment's ``fedlora`` is not this one.
    OtherFlower
        The installed version of Flower starts clients in another way.
    """
    check_script(script)
    command, here = shutil.which(COMMAND), Path(sys.executable).parent
    if command is None or Path(command).parent.resolve() != here.resolve():
        raise flower.NotSealed(
            f"{script.name} would start {command or 'nothing'} instead of {here / COMMAND}",
            "activate the environment that the package is installed in",
        )
    check_flower(os.environ)
    with tempfile.TemporaryDirectory() as draft:
        write_programs(Path(draft))
        sealed(os.environ, Path(draft))
    return Path(fedlora_flwr.__file__).parent


def arguments_of(script: Path, program: str = START) -> list[str]:
    """Return the arguments that a start script passes to its program.

    Parameters
    ----------
    script : Path
        The script of a device, or of a server.
    program : str (default: that of a device)
        The command behind ``exec``.

    Raises
    ------
    NotSealed
        The script has no such line, or a shell could not read it.
    """
    text = script.read_text(encoding="utf-8").replace("\\\n", " ")
    try:
        (line, *_) = (line for line in text.splitlines() if line.startswith(f"exec {program} "))
        return shlex.split(line)[len(f"exec {program}".split()) :]
    except ValueError as error:
        raise flower.NotSealed(
            f"the arguments of `{program}` in {script.name} cannot be read",
            f"replace {script.name} with one that `fedlora deploy init` writes now",
        ) from error


def check_script(script: Path) -> None:
    """Check that a start script starts the SuperNode by `start_supernode`.

    Raises
    ------
    NotSealed
        The script does not do that, or there is no script.
    """
    lines = script.read_text(encoding="utf-8").splitlines() if script.exists() else []
    words = [Path(word).name for line in lines for word in line.partition("#")[0].split()]
    starts = [line for line in lines if line.startswith(f"exec {START} ")]
    if not starts or not flower.programs().keys().isdisjoint(words):
        raise flower.NotSealed(
            f"{script.name} does not start the SuperNode by `{START}`: a server's code would run",
            f"replace {script.name} with one that `fedlora deploy init` writes now",
        )


def check_flower(env: Mapping[str, str]) -> None:
    """Check that the installed version of Flower can be restricted to installed code.

    Parameters
    ----------
    env : mapping of str to str
        Environment of the device's processes.

    Raises
    ------
    OtherFlower
        SuperExec starts clients in another way than by a program's name.
    NotSealed
        The client's program does not start, for instance because Flower loads apps in another way.
    """
    unknown = flower.started_by_superexec() - flower.programs().keys()
    if unknown:
        raise flower.OtherFlower(f"its SuperExec starts {', '.join(sorted(unknown))}")
    # In a process of its own, because the check changes Flower in the memory of its process.
    done = subprocess.run(
        [sys.executable, "-P", "-m", CLIENT_PROCESS, "--try"],
        env=dict(env), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise flower.NotSealed(
            f"a client's process does not start ({lines[-1] if lines else 'no reason given'})",
            "correct that, or install flwr 1.42 on this device",
        )


def write_programs(folder: Path) -> None:
    """Write a program for each name that Flower may start. All but three only print a refusal.

    Parameters
    ----------
    folder : Path
        The folder to write to.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    for name in flower.programs():
        if name in PROCESSES:
            lines = _python("-m", PROCESSES[name])
        else:
            lines = f"echo {shlex.quote(_REFUSAL.format(name=name))} >&2\nexit 1"
        with replacing(folder / name) as draft:
            draft.write_text(f"#!/bin/sh\n{lines}\n", encoding="utf-8")
            draft.chmod(0o700)


def sealed(env: Mapping[str, str], own: Path) -> dict[str, str]:
    """Return an environment in which Flower's programs are found in one folder only.

    Parameters
    ----------
    env : mapping of str to str
        The environment to begin with.
    own : Path
        Folder with the programs.

    Raises
    ------
    NotSealed
        A program would still be found elsewhere.
    """
    names = flower.programs().keys()
    found = env.get("PATH", os.defpath).split(os.pathsep)
    # Folders with Flower's own programs leave the path. If a replacement vanishes, its name is then
    # not found, instead of Flower's program.
    folders = [Path(entry) for entry in found if Path(entry).is_absolute()]
    kept = [folder for folder in folders if not any((folder / name).exists() for name in names)]
    path = os.pathsep.join(map(str, (own.resolve(), *kept)))
    for name in names:
        seen = shutil.which(name, path=path)
        if seen != str(own.resolve() / name):
            raise flower.NotSealed(
                f"{name} would be {seen or 'missing'} instead of {own / name}",
                f"move this device's folder to a disk that is not mounted noexec, and to a path "
                f"without {os.pathsep!r}",
            )
    quiet = {key: value for key, value in QUIET.items() if key.startswith("FLWR_")}
    return {**env, **quiet, "PATH": path, "PYTHONSAFEPATH": "1"}


def _check_arguments(arguments: Sequence[str]) -> None:
    for argument in arguments:
        name = argument.partition("=")[0]
        if len(name) > 3 and any(option.startswith(name) for option in _UNSAFE):
            allowed = f"none of {' and '.join(_UNSAFE)}, which let a server's code run"
            raise InvalidValue("argument", argument, allowed)


def _python(*arguments: str) -> str:
    return f'exec {shlex.join([sys.executable, "-P", *arguments])} "$@"'
