"""Activations of records in a file without a name, by what the model read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

_ENTRY = 256  # bytes of memory for the key and place of a row


class Activations:
    """Rows of activations, which one process keeps on disk and reads again.

    The file has no name. It takes no space once the process has ended, however it ends, and no
    other process can open it. A process that was forked begins with an empty file of its own.

    Parameters
    ----------
    folder : Path
        Folder on the disk to use. It is made if it is missing.
    limit : int
        Largest size in bytes. Further rows are not kept. A full disk ends the keeping, too.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._places: dict[bytes, int] = {}
        self._file: IO[bytes] | None = None
        self._end = 0
        self._owner = os.getpid()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        if self._owner != os.getpid():  # Parent and child would move each other's place in it.
            self.clear()
        return key in self._places

    @property
    def mostly_full(self) -> bool:
        """Whether more than half of the limit is used."""
        return self._used > self._limit / 2

    @property
    def _used(self) -> int:
        return self._end + len(self._places) * _ENTRY

    def clear(self) -> None:
        """Forget all rows."""
        self._places.clear()
        self._end, self._owner = 0, os.getpid()
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self, keys: Sequence[bytes], like: Tensor) -> Tensor:
        r"""Return kept rows.

        Parameters
        ----------
        keys : Sequence[bytes]
            Keys of n rows, all of which are kept.
        like : Tensor
            One row, shape (1, \*shape), of the same type and shape as all rows.

        Returns
        -------
        Tensor
            Shape (n, \*shape), on the CPU.
        """
        assert self._file is not None
        found = torch.empty((len(keys), *like.shape[1:]), dtype=like.dtype)
        view = _view(found)
        size = len(view) // len(keys)
        for number, key in enumerate(keys):
            self._file.seek(self._places[key])
            part = view[number * size : (number + 1) * size]
            if self._file.readinto(part) != size:  # type: ignore[attr-defined]
                raise OSError("The file of activations has fewer bytes than were written to it.")
        return found

    def keep(self, keys: Sequence[bytes], rows: Tensor) -> None:
        r"""Keep rows while there is space.

        Parameters
        ----------
        keys : Sequence[bytes]
            Keys of the rows. Keys that are kept already are left as they are.
        rows : Tensor
            Shape (n, \*shape).
        """
        data = _view(rows.detach().cpu().contiguous())
        size = len(data) // len(keys)
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
            for number, key in enumerate(keys):
                if key in self._places:
                    continue
                if self._used + _ENTRY + size > self._limit:
                    return
                self._file.seek(self._end)
                if self._file.write(data[number * size : (number + 1) * size]) != size:
                    raise OSError("The disk is full.")
                self._places[key] = self._end
                self._end += size
        except OSError:
            self._limit = 0  # What is kept already can still be read.


def _view(rows: Tensor) -> memoryview:
    """Return the bytes of a dense tensor on the CPU, which share its memory."""
    numbers: Any = rows.view(-1).view(torch.uint8).numpy()
    return memoryview(numbers)
