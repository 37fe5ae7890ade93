"""Takes away what another operating system does not have, and then gives ``fedlora`` commands.

Packages of others are imported before, since they ask for the system at their import.
"""

from __future__ import annotations

import errno
import fcntl
import importlib
import json
import os
import shutil
import signal
import sys
import types
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

PACKAGES = (
    "datasets", "dp_accounting", "filelock", "flwr.simulation", "flwr.serverapp",
    "flwr.clientapp", "flwr_datasets", "multiprocessing.synchronize", "opacus", "peft", "rich",
    "safetensors.torch", "scipy.optimize", "scipy.special", "scipy.stats", "sklearn.datasets",
    "timm", "torch", "torch.func", "transformers", "typer",
)  # fmt: skip
WINDOWS = (
    "fork", "forkpty", "register_at_fork", "pread", "pwrite", "fdatasync", "killpg", "setsid",
    "getpgid", "getuid", "geteuid", "getppid", "mkfifo", "statvfs", "O_CLOEXEC",
    "sched_getaffinity",
)  # fmt: skip
MODULES = ("fcntl", "resource", "pwd", "grp", "termios")
SIGNALS = ("SIGHUP", "SIGKILL", "SIGCHLD", "SIGUSR1", "SIGALRM", "pthread_sigmask", "setitimer")


def become_windows() -> None:
    """Leave what Python has on Windows, where files behave as they do there."""
    opened, synced, lock = os.open, os.fsync, fcntl.lockf

    def open_file(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *rest, **named)

    def sync(descriptor: int) -> None:
        if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & (os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EBADF, "Bad file descriptor")
        synced(descriptor)

    def locking(descriptor: int, mode: int, size: int) -> None:
        assert mode == msvcrt.LK_NBLCK
        try:
            lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, size, 0, os.SEEK_CUR)
        except BlockingIOError as error:
            raise PermissionError(errno.EACCES, "Permission denied") from error

    for place, names in ((os, WINDOWS), (signal, SIGNALS)):
        for name in names:
            delattr(place, name)
    modules: Any = sys.modules
    modules.update(dict.fromkeys(MODULES))  # Importing them fails.
    msvcrt: Any = types.ModuleType("msvcrt")
    msvcrt.locking, msvcrt.LK_NBLCK = locking, 2
    sys.modules["msvcrt"] = msvcrt
    searched = types.SimpleNamespace(NeedCurrentDirectoryForExePath=lambda _: False)
    vars(shutil)["_winapi"] = searched  # From Python 3.12 on, `shutil.which` asks Windows.
    os.open, os.fsync, sys.platform = open_file, sync, "win32"  # type: ignore[assignment]


def become_macos() -> None:
    """Leave what Python has on macOS; the file system has no full sync."""
    del os.fdatasync, os.sched_getaffinity
    fcntl.F_FULLFSYNC = 51  # type: ignore[attr-defined]
    sys.platform = "darwin"


def main(system: str, commands: list[list[str]]) -> None:
    """Run ``fedlora`` with each command as on Windows or macOS, and print what came of it."""
    for name in PACKAGES:
        importlib.import_module(name)
    {"windows": become_windows, "macos": become_macos}[system]()
    assert not [name for name in sys.modules if name.startswith("fedlora_flwr")]
    app, runner = importlib.import_module("fedlora_flwr.cli").app, CliRunner()
    done = [runner.invoke(app, arguments, prog_name="fedlora") for arguments in commands]
    print(json.dumps([{"code": each.exit_code, "errors": each.stderr} for each in done]))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
