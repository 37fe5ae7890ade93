"""Folders for the user's files, their access rights, and atomic writes."""

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
from typing import IO, Any, TypeVar

from filelock import FileLock, Timeout

from fedlora_flwr.errors import FedLoRAError
from fedlora_flwr.operating_system import sync_path

T = TypeVar("T")

_LOGGER = logging.getLogger(__name__)
_PATIENCE = 10.0  # Seconds to wait for a lock before a warning is logged.
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_BLOCK = 1 << 16
_IN_THE_WAY = (errno.ENOTDIR, errno.EEXIST)
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


class FileTrouble(FedLoRAError, OSError):
    """A file or folder cannot be used. The text names it and the reason."""

    @classmethod
    def of(cls, error: Exception, path: Path | None = None) -> FileTrouble:
        """Turn an error of the operating system into one with the path and, if known, a remedy.

        Parameters
        ----------
        error : Exception
            The error that was raised.
        path : Path, optional
            The file or folder that was in use, in case the error does not name one.
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


def is_full(error: OSError) -> bool:
    """Tell whether an error says that there is no room: on the disk, in a quota, for one file."""
    return error.errno in _FULL


def cache_folder() -> Path:
    """Return this package's folder under ``XDG_CACHE_HOME``, or under ``~/.cache`` without it.

    All files in it can be made again.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedlora"


SERVER_STATE = "FEDLORA_SERVER_STATE"
"""Environment variable with the folder for a server's files that are kept between runs."""


def data_folder() -> Path:
    """Return this package's folder under ``XDG_DATA_HOME``, or ``~/.local/share`` without it.

    Files in it, such as ledgers, cannot be made again.
    """
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "fedlora"


def name_of_run(client: str, run: str) -> str:
    """Return a file name without suffix for a client in a run; both names may be any text."""
    return hashlib.sha256(f"{len(client)}:{client}{run}".encode()).hexdigest()[:32]


def private_folder(path: Path) -> Path:
    """Make a folder and its parents with access for the owner only, and return the folder.

    An existing folder keeps its mode, since the user may have chosen it. Only inside this package's
    data folder and its cache of data sets, other users lose access to an existing folder.

    Raises
    ------
    FileTrouble
        The folder cannot be made, or this process cannot write to it.
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
            with suppress(OSError):  # Another user may own the folder.
                path.chmod(mode & 0o700)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock ``<path>.lock``. After ten seconds of waiting, a warning is logged.

    Raises
    ------
    FileTrouble
        The file of the lock cannot be made, or the file system has no locks.
    """
    lock = FileLock(f"{path}.lock")
    try:
        # If the file cannot be made, FileLock would try forever. This raises an error instead.
        Path(lock.lock_file).open("ab").close()
        try:
            lock.acquire(timeout=_PATIENCE)
        except Timeout:
            _LOGGER.warning("Waiting for another process, which holds %s.lock.", path)
            lock.acquire()
    except (OSError, NotImplementedError) as error:  # The latter: a file system without locks.
        raise FileTrouble.of(error, Path(lock.lock_file)) from error
    try:
        yield
    finally:
        lock.release()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader sees the old content or all of the new content.

    Raises
    ------
    FileTrouble
        The file cannot be written.
    """
    with replacing(path) as draft:
        draft.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a draft, which replaces the file if no error is raised.

    The caller makes the draft: a file that replaces a file, or a folder that replaces a folder. Its
    content is synced before it gets its final name, so a power cut leaves the old or the new
    content.

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
        # Libraries that are written in Rust have their own types of errors, whose text holds the
        # number of the system's error.
        if found := _SYSTEM_ERROR.search(str(error)):
            error = OSError(int(found[1]), os.strerror(int(found[1])))
        if not isinstance(error, OSError):
            raise
        if _names_a_path(error) and draft in (named := Path(error.filename), *named.parents):
            error.filename = None
        raise FileTrouble.of(error, path) from error


def read_or_make(path: Path, read: Callable[[], T | None], make: Callable[[Path], None]) -> T:
    """Return the content of a cached file, which is made now if it is missing or damaged.

    If several processes need it at once, one makes it and the others wait, so that all of them get
    the same content.

    Parameters
    ----------
    path : Path
        File or folder of the cache. Its parent folder is made if missing.
    read : Callable
        Reads the content; returns ``None`` if it is missing or damaged.
    make : Callable
        Writes the content to a draft (see `replacing`). If it raises an error, nothing changes.

    Raises
    ------
    FileTrouble
        The content has to be made, and cannot be written or read back.
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
        for left in path.parent.glob(f".{path.name}.*"):  # Drafts of processes that were killed.
            _remove(left)
        with replacing(path) as draft:
            make(draft)
        if (found := read()) is not None:
            return found
    raise FileTrouble(f"{path} was written and cannot be read back. Choose another folder.")


def append(path: Path, content: bytes) -> None:
    """Append all of the content to a file of lines, or nothing.

    A last line without an end was left by a process that was killed while it wrote. It is removed.

    Raises
    ------
    FileTrouble
        The file cannot be written.
    """
    try:
        with path.open("a+b", buffering=0) as stream:
            before, written = _after_last_line(stream), 0
            if stream.seek(0, os.SEEK_END) > before:
                stream.truncate(before)
            try:
                # Usually one call writes all; it writes less if the disk is full.
                while written < len(content):
                    written += stream.write(content[written:])
            except BaseException:
                stream.truncate(before)
                raise
    except OSError as error:
        raise FileTrouble.of(error, path) from error


def _after_last_line(stream: IO[bytes]) -> int:
    """Return the place after a file's last complete line."""
    end = stream.seek(0, os.SEEK_END)
    if end:
        stream.seek(end - 1)
        if stream.read(1) == b"\n":  # As nearly always; only a torn line is searched for.
            return end
    while end:
        start = max(0, end - _BLOCK)
        stream.seek(start)
        found = stream.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def to_json(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON text; numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write a value as a JSON file, atomically (see `replace_file` and `to_json`)."""
    replace_file(path, (to_json(value, indent=2) + "\n").encode())


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite by None, since JSON has no infinity and no NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _names_a_path(error: OSError) -> bool:
    return isinstance(error.filename, str | bytes)


def _sync(path: Path) -> None:
    """Sync a file, or a folder with all its content, to the disk."""
    folder = path.is_dir()
    for inner in path.iterdir() if folder else ():
        _sync(inner)
    try:
        sync_path(path)
    except OSError:
        if not folder:  # Some file systems cannot sync folders.
            raise


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
    """Swap two names atomically; return False if the system cannot do this."""
    if sys.platform != "linux":
        return False
    names = os.fsencode(first), os.fsencode(second)
    try:
        failed = ctypes.CDLL(None).renameat2(_HERE, names[0], _HERE, names[1], _EXCHANGE)
    except AttributeError:  # The C library has no such function.
        return False
    return not failed


def _remove(draft: Path) -> None:
    if draft.is_dir():
        shutil.rmtree(draft, ignore_errors=True)
    else:
        with suppress(OSError):
            draft.unlink()
