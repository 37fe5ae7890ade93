"""Where files of the user's are kept, who may read them, and how they are written whole."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from fedlora_flwr.errors import FedLoRAError

T = TypeVar("T")

_LOGGER = logging.getLogger(__name__)
_PATIENCE = 10.0  # seconds to wait for a lock in silence
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_IN_THE_WAY = (errno.ENOTDIR, errno.EEXIST)
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


class FileTrouble(FedLoRAError, OSError):
    """A file or folder cannot be used; the text names it, and says why."""

    @classmethod
    def of(cls, error: Exception, path: Path | None = None) -> FileTrouble:
        """Describe an error of the operating system's.

        Parameters
        ----------
        error : Exception
            What was raised.
        path : Path, optional
            What was being written, where the error does not say.
        """
        if isinstance(error, FileTrouble):
            return error
        number, reason = None, str(error)
        if isinstance(error, OSError):
            number, reason = error.errno, error.strerror or reason
            path = Path(os.fsdecode(error.filename)) if _names_a_path(error) else path
        if number in _FULL:
            reason += ". Make room there, or choose another folder"
        elif number in _CLOSED:
            reason += ". Choose a folder that can be written to"
        elif number in _IN_THE_WAY:
            reason = "a file is in the way of a folder. Move it, or choose another folder"
        trouble = cls(f"{path} cannot be used: {reason}." if path else f"{reason}.")
        trouble.errno = number
        return trouble


def cache_folder() -> Path:
    """Return this package's folder under ``XDG_CACHE_HOME``, or under ``~/.cache`` without it.

    What is in it can be made again.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedlora"


SERVER_STATE = "FEDLORA_SERVER_STATE"
"""Environment variable with the folder in which a fleet's server keeps what outlives a run."""


def data_folder() -> Path:
    """Return this package's folder under ``XDG_DATA_HOME``, or ``~/.local/share`` without it.

    What is in it, ledgers among it, cannot be made again.
    """
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "fedlora"


def name_of_run(client: str, run: str) -> str:
    """Return a file's name without suffix for a client in a run; any text may name either."""
    return hashlib.sha256(f"{len(client)}:{client}{run}".encode()).hexdigest()[:32]


def private_folder(path: Path) -> Path:
    """Make a folder that its owner alone may enter, with the folders above it, and return it.

    A folder that is there already keeps its mode, since its user may have chosen it. Others lose
    access to folders inside this package's own data folder and its cache of data sets.

    Raises
    ------
    FileTrouble
        It cannot be made, or not be written to.
    """
    try:
        _make_private(path)
    except OSError as error:
        raise FileTrouble.of(error, path) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise FileTrouble.of(PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path)))
    return path


def _make_private(path: Path) -> None:
    missing = [one for one in (path, *path.parents) if not one.exists()]
    for one in reversed(missing):
        with suppress(FileExistsError):  # Another process was first.
            one.mkdir(mode=0o700)
    path.mkdir(exist_ok=True)
    ours = (data_folder(), cache_folder() / "datasets")
    if not missing and any(path.is_relative_to(one) for one in ours):
        mode = path.stat().st_mode
        if mode & 0o077:
            with suppress(OSError):  # It may be another user's.
                path.chmod(mode & 0o700)


def sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold ``<path>.lock``, and say so where another process makes this one wait.

    Raises
    ------
    FileTrouble
        The lock cannot be made.
    """
    lock = FileLock(f"{path}.lock")
    try:
        # FileLock tries without end where the file cannot be made.
        Path(lock.lock_file).open("ab").close()
        try:
            lock.acquire(timeout=_PATIENCE)
        except Timeout:
            _LOGGER.warning("Waiting for another process, which holds %s.lock.", path)
            lock.acquire()
    except (OSError, NotImplementedError) as error:  # A file system without locks is the latter.
        raise FileTrouble.of(error, Path(lock.lock_file)) from error
    try:
        yield
    finally:
        lock.release()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees all of it or nothing."""
    with replacing(path) as draft:
        draft.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a draft, which takes the place of the file if no error comes.

    The draft may be made a folder, and takes the place of a folder then. Its content reaches the
    disk before its name does, so that a power cut leaves the old or the new, too.

    Raises
    ------
    FileTrouble
        The draft cannot be written.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        yield draft
        _sync(draft)
        _take_place(draft, path)
    except BaseException as error:
        _remove(draft)
        if isinstance(error, FedLoRAError):
            raise
        # Libraries in other languages have error types of their own.
        if found := _SYSTEM_ERROR.search(str(error)):
            error = OSError(int(found[1]), os.strerror(int(found[1])))
        if not isinstance(error, OSError):
            raise
        if _names_a_path(error) and draft in (named := Path(error.filename), *named.parents):
            error.filename = None
        raise FileTrouble.of(error, path) from error


def read_or_make(path: Path, read: Callable[[], T | None], make: Callable[[Path], None]) -> T:
    """Return what is read from a cache, made now if it is missing or damaged.

    Of several processes that miss it at once, one makes it and the others wait, so that all of them
    have the same content.

    Parameters
    ----------
    path : Path
        File or folder of the cache. Its folder is made where it is missing.
    read : Callable
        Reads it; ``None`` if it is missing or is not what was written.
    make : Callable
        Writes it to a draft (see `replacing`). An error leaves everything as it was.

    Raises
    ------
    FileTrouble
        It has to be made, and cannot be written or read back.
    """
    if (found := read()) is not None:
        return found
    private_folder(path.parent)
    with locked(path):
        # Another process may have made it while this one waited.
        if (found := read()) is not None:
            return found
        if path.exists():
            _LOGGER.warning("%s is damaged and is made again.", path)
        for left in path.parent.glob(f".{path.name}.*"):  # By processes that were killed.
            _remove(left)
        with replacing(path) as draft:
            make(draft)
        if (found := read()) is not None:
            return found
    raise FileTrouble(f"{path} was written and cannot be read back. Choose another folder.")


def append(path: Path, content: bytes) -> None:
    """Write to a file's end: all of the content, or nothing.

    Raises
    ------
    FileTrouble
        The file cannot be written.
    """
    try:
        with path.open("ab", buffering=0) as stream:
            before, written = stream.tell(), 0
            try:
                # One call writes all, unless the disk is full.
                while written < len(content):
                    written += stream.write(content[written:])
            except BaseException:
                stream.truncate(before)
                raise
    except OSError as error:
        raise FileTrouble.of(error, path) from error


def to_json(value: Any, indent: int | None = None) -> str:
    """Write JSON; what is not finite becomes null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON has no infinity: an ε without bound is null."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _names_a_path(error: OSError) -> bool:
    return isinstance(error.filename, str | bytes)


def _sync(path: Path) -> None:
    """Let a file, or a folder with all that is in it, reach the disk."""
    folder = path.is_dir()
    for inner in path.iterdir() if folder else ():
        _sync(inner)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not folder:  # Not every file system syncs folders.
            raise
    finally:
        os.close(descriptor)


def _take_place(draft: Path, path: Path) -> None:
    if not (draft.is_dir() and path.is_dir()):
        draft.replace(path)
    elif _exchange(draft, path):
        shutil.rmtree(draft, ignore_errors=True)
    else:
        old = draft.with_name(f"{draft.name}.old")
        path.rename(old)
        draft.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names at once; return whether the system can."""
    if sys.platform != "linux":
        return False
    names = os.fsencode(first), os.fsencode(second)
    try:
        failed = ctypes.CDLL(None).renameat2(_HERE, names[0], _HERE, names[1], _EXCHANGE)
    except AttributeError:  # A C library that has no name for it.
        return False
    return not failed


def _remove(draft: Path) -> None:
    if draft.is_dir():
        shutil.rmtree(draft, ignore_errors=True)
    else:
        with suppress(OSError):
            draft.unlink()
