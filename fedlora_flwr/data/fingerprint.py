"""Short names for the content of files, so that what was made from them can be kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

# Read in a tenth of a second from memory. What is larger is known by samples.
WHOLE = 64 * 2**20
_SAMPLES = 64
_SAMPLE = 64 * 2**10


def content_digest(path: Path) -> str:
    """Return a hash of a file's length and content.

    Up to 64 MiB the whole content counts; of a larger file 64 blocks of 64 KiB do, spread evenly
    from its first byte to its last.

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

    Where the files have up to 64 MiB together their content alone counts: copies and touched
    files are the same, and a change is noticed even if size and time stay. Of larger sets each
    file's absolute path, length and time of change (ns) count too, and of a large file samples
    (`content_digest`); of many small files that are large together these alone count, because
    reading 100,000 pictures takes longer than most of what is made from them.
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
