"""A device's process that stays alive between messages, to reuse what it has loaded.

Flower starts a process for each message, which spends most of its time importing packages and
building the model. If a device's file says ``keep-warm``, Flower's process hands the message to
this one, over a socket that only the device's user can reach.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from fedlora_flwr.clients.device import Device
from fedlora_flwr.errors import ClientFailed
from fedlora_flwr.files import data_folder, private_folder, replace_file

Result = TypeVar("Result")


@dataclass(frozen=True)
class WarmProcess:
    """A process that is started on demand and ends by itself.

    It ends after some time without a call, when the process that started its first caller is gone
    (on a device, Flower's), or when a caller needs a process that was made for something else.

    Parameters
    ----------
    address : Path
        File with the address of the process's socket.
    made_for : str
        Digest of the app, the device's file and its data. A caller with another digest gets a new
        process.
    seconds : float
        Seconds without a call after which the process ends.
    """

    address: Path
    made_for: str
    seconds: float

    @classmethod
    def of(cls, device: Device, file: Path) -> WarmProcess:
        """Return a device's process, made for this app, for the device's file and for its data."""
        folder = Path(str(device.settings.get("state-dir") or data_folder()))
        name = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]
        made_for = hashlib.sha256(__file__.encode())
        for path in _files(file, *device.folders):
            status = path.stat()
            made_for.update(f"{path}\n{status.st_size} {status.st_mtime_ns}\n".encode())
        return cls(folder / f"warm-{name}", made_for.hexdigest(), device.keep_warm)

    def call(self, function: Callable[..., Result], *args: object) -> Result:
        """Call a function in the process; calls wait for each other.

        Parameters
        ----------
        function : callable
            Something that can be imported by its name.
        *args : object
            Its arguments, which like its result can be pickled.

        Raises
        ------
        ClientFailed
            The process does not start, or ended before it answered. Effects of the function until
            then remain, such as rows in a ledger.
        Exception
            The error that the function raises.
        """
        private_folder(self.address.parent)
        with FileLock(f"{self.address}.lock"):
            connection = self._reach() or self._start()
        with connection:
            try:
                connection.send((function.__module__, function.__name__, args))
                returned, outcome = connection.recv()
            except (EOFError, OSError) as error:
                raise ClientFailed(
                    "the device's warm process ended before it answered; its own log says more"
                ) from error
        if not returned:
            raise outcome
        result: Result = outcome
        return result

    def _reach(self) -> Connection | None:
        """Connect to the process, if one exists and was made for the same; ``None`` if not."""
        connection = None
        try:
            connection = Client(self.address.read_text())
            connection.send(self.made_for)
            if connection.recv():
                return connection
        except (EOFError, OSError):
            pass  # The process has ended, or is about to end.
        if connection is not None:
            connection.close()
        return None

    def _clear(self) -> None:
        """Remove the socket of a process that was killed, which could not do it itself."""
        with contextlib.suppress(OSError):
            socket = Path(self.address.read_text())
            socket.unlink(missing_ok=True)
            socket.parent.rmdir()

    def _start(self) -> Connection:
        self._clear()
        # Pass on the import path, which may hold the app that Flower has installed for this run.
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, self.made_for, str(self.seconds), str(os.getppid())],
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        with process.stdout:
            address = process.stdout.readline().rstrip("\n")
        if address:
            replace_file(self.address, address.encode())
            if (connection := self._reach()) is not None:
                return connection
        raise ClientFailed("the device's warm process did not start; its own log says why")


def _files(*paths: Path) -> Iterator[Path]:
    """Yield the given files, and the files in the given folders."""
    for path in paths:
        yield from sorted(path.rglob("*")) if path.is_dir() else [path]


class _Watch:
    """Ends this process after a time without calls, or when its first caller's parent is gone."""

    def __init__(self, address: str, seconds: float, parent: int) -> None:
        self._address, self._seconds, self._parent = address, seconds, parent
        self._calls = 0
        self._last = time.monotonic()
        threading.Thread(target=self._end, daemon=True).start()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Stop the clock during a call."""
        self._calls += 1
        try:
            yield
        finally:
            self._last = time.monotonic()
            self._calls -= 1

    def _end(self) -> None:
        while self._calls or time.monotonic() - self._last < self._seconds:
            if not _lives(self._parent):
                # Nobody is left to get the result, so end at once, as Flower's own process does.
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(min(1.0, self._seconds / 4))
        # Ask like a caller that needs another process, so that the server ends in an orderly way.
        with contextlib.suppress(OSError), Client(self._address) as connection:
            connection.send(None)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def handle_calls(made_for: str, seconds: float, parent: int) -> None:
    """Answer calls, one at a time, until nobody needs this process any more."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # The socket is in a folder of its own that only this user can enter.
    with Listener(family="AF_UNIX", backlog=16) as listener:
        address = str(listener.address)
        print(address, flush=True)
        os.dup2(2, 1)
        watch = _Watch(address, seconds, parent)
        wanted = True
        while wanted:
            # The connection of a caller that is killed breaks.
            gone = contextlib.suppress(EOFError, OSError)
            with listener.accept() as connection, watch.call(), gone:
                wanted = connection.recv() == made_for
                connection.send(wanted)
                if wanted:
                    connection.send(_outcome(*connection.recv()))


def _outcome(module: str, name: str, args: tuple[object, ...]) -> tuple[bool, Any]:
    """Return true and a function's result, or false and the error that it raised."""
    try:
        return True, getattr(importlib.import_module(module), name)(*args)
    except Exception as error:
        return False, error


if __name__ == "__main__":
    handle_calls(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
