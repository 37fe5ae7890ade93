"""What a process reads, writes, starts and connects to, seen from Python's own audit events.

Events come from the interpreter, so code under test cannot avoid them from Python. Libraries in C
open files without an event; `Tripwire` asks the kernel about a folder instead.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Events whose first argument is a path, and whether they write.
_PATHS = {
    "os.listdir": False, "os.scandir": False, "os.mkdir": True, "os.remove": True,
    "os.rmdir": True, "os.rename": True, "os.link": True, "os.symlink": True, "os.truncate": True,
    "os.chmod": True, "os.chown": True, "os.utime": True, "os.chdir": False,
    "shutil.copyfile": False, "shutil.rmtree": True, "sqlite3.connect": True, "glob.glob": False,
}  # fmt: skip
# Their second argument is a folder's descriptor, or -1.
_BELOW = ("os.remove", "os.rmdir")
_FORBIDDEN = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
    "os.forkpty", "socket.connect", "socket.bind", "socket.getaddrinfo", "pickle.find_class",
    "urllib.Request", "webbrowser.open", "ftplib.connect", "smtplib.connect",
)  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

Event = tuple[str, str, bool]
"""Kind, path or argument, and whether it writes."""


class Recorder:
    """Keeps audit events while it is on. Hooks cannot be taken out, so there is one a process."""

    _installed: Recorder | None = None

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._on = False
        sys.addaudithook(self._hear)

    @classmethod
    def of_process(cls) -> Recorder:
        if cls._installed is None:
            cls._installed = cls()
        return cls._installed

    @contextmanager
    def recording(self) -> Iterator[list[Event]]:
        self.events = []
        self._on = True
        try:
            yield self.events
        finally:
            self._on = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what a test itself does meanwhile."""
        before, self._on = self._on, False
        try:
            yield
        finally:
            self._on = before

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event == "open":
            path, mode, flags = args
            if _is_path(path):
                writes = bool(flags & _WRITES) or any(c in (mode or "") for c in "wax+")
                # Python does not tell below which open folder `os.open` opens a name. Only the
                # removal of whole folders does that here, and it reads.
                if mode is not None or os.fsdecode(path).startswith("/") or writes:
                    self.events.append((event, _absolute(path), writes))
        elif event in _PATHS:
            if _is_path(args[0]):
                folder = next((a for a in args[1:] if type(a) is int and a >= 0), None)
                below = None if event not in _BELOW else folder
                self.events.append((event, _absolute(args[0], below), _PATHS[event]))
        elif event == "import":
            self.events.append((event, str(args[0]), False))
        elif event in _FORBIDDEN:
            self.events.append((event, repr(args)[:200], True))


def _is_path(value: object) -> bool:
    return isinstance(value, str | bytes | os.PathLike)


def _absolute(path: str | bytes | os.PathLike[Any], below: int | None = None) -> str:
    folder = Path() if below is None else Path(f"/proc/self/fd/{below}").readlink()
    return os.path.realpath(folder / os.fsdecode(path))


class Tripwire:
    """Tells whether anybody opened, read or changed a folder or a file right below it (Linux)."""

    _OPEN, _ACCESS, _MODIFY, _CREATE, _DELETE = 0x20, 0x1, 0x2, 0x100, 0x200

    def __init__(self, *folders: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        mask = self._OPEN | self._ACCESS | self._MODIFY | self._CREATE | self._DELETE
        for folder in folders:
            if self._libc.inotify_add_watch(self._fd, os.fsencode(folder), mask) < 0:
                raise OSError(ctypes.get_errno(), f"inotify_add_watch {folder}")

    def touched(self) -> list[str]:
        """Return the names of files that were touched since the last call."""
        found = []
        try:
            content = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return []
        while content:
            _, _, _, length = struct.unpack_from("iIII", content)
            found.append(content[16 : 16 + length].rstrip(b"\0").decode() or ".")
            content = content[16 + length :]
        return found

    def close(self) -> None:
        os.close(self._fd)
