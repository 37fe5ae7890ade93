"""What differs between operating systems: locks, syncing, and signals."""

from __future__ import annotations

import hashlib
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

fcntl: Any
resource: Any
try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None

WINDOWS = sys.platform == "win32"
ENDING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""Signals that ask a process to end."""
READERS = 0.1
"""Seconds in which a reader that asks whether a lock is held (`lock_held`) has let go of it."""
_QUIET = 60.0
"""Seconds without a write, after which the work of another process may be given up."""
_FAR = 2**30  # A byte beyond the end of each locked file: Windows hides locked bytes from readers.


def untested() -> str:
    """Return a sentence for the user of a system on which this package is not tested, or ""."""
    if WINDOWS:
        return (
            "This package is not tested on Windows. Runs in this process should work "
            "(`fedlora simulate`). Flower's engine on Ray and deployment need Linux or macOS."
        )
    if sys.platform == "darwin":
        return "This package is not tested on macOS. All of it should work there."
    return ""


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock an open file until it is closed, unless another one holds the lock.

    Parameters
    ----------
    descriptor : int
        The open file.
    shared : bool (default: False)
        Whether others may lock it in the same way. Windows has no such locks here.

    Returns
    -------
    bool
        Whether the file is locked by this descriptor now.

    Raises
    ------
    OSError
        The file system has no locks.
    """
    try:
        if fcntl is not None:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        else:
            import msvcrt

            at = os.lseek(descriptor, 0, os.SEEK_CUR)
            os.lseek(descriptor, _FAR, os.SEEK_SET)
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            finally:
                os.lseek(descriptor, at, os.SEEK_SET)
    except (BlockingIOError, PermissionError):
        return False
    return True


def lock_held(path: Path) -> bool | None:
    """Tell whether a process of this machine has locked a file (see `try_lock`).

    Parameters
    ----------
    path : Path
        The file. It is only read.

    Returns
    -------
    bool or None
        False if there is no such file; None where the file system cannot tell.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        return not try_lock(descriptor, shared=True)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def host_sign() -> str:
    """Return a sign of this machine, from which its name cannot be read."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:16]


def abandoned(lock: Path, host: str, files: Iterable[Path]) -> bool:
    """Tell whether work that another process did has ended, as that of a killed process has.

    Parameters
    ----------
    lock : Path
        The file that the process locks while it works.
    host : str
        The sign of its machine, or an empty text if it is not known. From another machine the lock
        may not be seen, so the work there is never taken for abandoned.
    files : Iterable[Path]
        What it writes. It may start to hold the lock a minute after it has written to one of them.
    """
    written = max((file.stat().st_mtime for file in files if file.exists()), default=0.0)
    if time.time() - written < _QUIET or host not in ("", host_sign()):
        return False
    return lock_held(lock) is False


def sync(descriptor: int) -> None:
    """Let an open file's content and size reach the disk.

    On macOS `os.fsync` leaves them in the disk's own memory, which a power cut clears.
    """
    if full := getattr(fcntl, "F_FULLFSYNC", None):
        try:
            fcntl.fcntl(descriptor, full)
        except OSError:  # The file system has no such request.
            os.fsync(descriptor)
    else:
        os.fsync(descriptor)


def sync_content(descriptor: int) -> None:
    """Let the content of an open file that keeps its size reach the disk."""
    (getattr(os, "fdatasync", None) or sync)(descriptor)


def sync_path(path: Path) -> None:
    """Let a file, or the names in a folder, reach the disk.

    Raises
    ------
    OSError
        The path cannot be opened or synced.
    """
    if WINDOWS and path.is_dir():  # Windows opens no folders, and writes names by itself.
        return
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def read_at(descriptor: int, size: int, at: int) -> bytes:
    """Return up to ``size`` bytes of an open file from a place in it."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, at)
    os.lseek(descriptor, at, os.SEEK_SET)
    return os.read(descriptor, size)


def write_at(descriptor: int, content: bytes, at: int) -> int:
    """Write bytes to a place in an open file; return how many were written."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, content, at)
    os.lseek(descriptor, at, os.SEEK_SET)
    return os.write(descriptor, content)


def after_fork(action: Callable[[], None]) -> None:
    """Call a function in each child of this process that is a fork of it."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=action)


@contextmanager
def blocked(sign: int) -> Iterator[None]:
    """Keep a signal from processes that are started in the block, where the system can."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [sign])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def largest_memory() -> int | None:
    """Return the largest resident memory of this process in bytes; ``None`` on Windows."""
    if resource is None:
        return None
    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
