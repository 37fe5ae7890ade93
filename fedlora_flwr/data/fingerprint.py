"""Hashes of files, under which data made from these files is cached."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

# 64 MiB take about 0.1 s to read from memory. Larger files are hashed by samples.
WHOLE = 64 * 2**20
_SAMPLES = 64
_SAMPLE = 64 * 2**10


def content_digest(path: Path) -> str:
    """Return a hash of a file's length and content.

    The hash covers the whole content of a file of up to 64 MiB. For a larger file it covers 64
    blocks of 64 KiB, spread evenly from the first byte to the last.

    Parameters
    ----------
    path : Path
        A file that can be read.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    size = path.stat().st_size
    found = hashlib.sha256(size.to_bytes(8, "big"))
    with path.open("rb") as stream:
        if size <= WHOLE:
            while block := stream.read(2**20):
                found.update(block)
            return found.hexdigest()
        for number in range(_SAMPLES):
            stream.seek(number * (size - _SAMPLE) // (_SAMPLES - 1))
            found.update(stream.read(_SAMPLE))
    return found.hexdigest()


def files_digest(paths: Iterable[Path], root: Path) -> str:
    """Return a hash of files' names below ``root`` and their content.

    If the files have up to 64 MiB together, the hash covers only their names and content: copies
    and touched files have the same hash, and every change of content changes it. For larger sets
    the hash also covers each file's absolute path, length and modification time (ns). In larger
    sets only files above 1 MiB are read (`content_digest`), because reading 100,000 small pictures
    would take longer than making most of the data that is cached.
    """
    files = sorted(paths)
    states = [path.stat() for path in files]
    small = sum(state.st_size for state in states) <= WHOLE
    found = hashlib.sha256()
    for path, state in zip(files, states, strict=True):
        parts = [path.relative_to(root).as_posix()]
        if not small:
            parts += [str(path.absolute()), str(state.st_size), str(state.st_mtime_ns)]
        if small or state.st_size > WHOLE // _SAMPLES:
            parts.append(content_digest(path))
        found.update("\0".join(parts).encode() + b"\n")
    return found.hexdigest()
