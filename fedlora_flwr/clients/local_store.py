"""Keeps arrays that stay with a client between rounds on disk (FedSA-LoRA, arXiv 2410.01463)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.files import name_of_run, private_folder, replace_file

_KEPT = 3  # Rounds: the current one, and two earlier ones that a server may ask for again.


class LocalStore:
    """Files for each client and run; a deployed client is a new process for every message.

    A server that was killed asks for a round again, so the arrays of earlier rounds are kept too.

    Parameters
    ----------
    folder : Path
        The folder of the files. It is made when the first file is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, client: str, run: str, server_round: int = 0) -> Path:
        """Return the path of a client's file for a round. Any text is a valid client or run."""
        return self._folder / f"{name_of_run(client, run)}-{server_round:09d}.safetensors"

    def keep(
        self,
        client: str,
        run: str,
        arrays: Mapping[str, NDArray[np.float32]],
        server_round: int = 0,
    ) -> None:
        """Write a round's arrays atomically, and delete those of later rounds."""
        private_folder(self._folder)
        content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        replace_file(self.path(client, run, server_round), content)
        kept = self._rounds(client, run)
        earlier = [number for number in kept if number <= server_round]
        for number in {*kept} - {*earlier[-_KEPT:]}:
            self.path(client, run, number).unlink(missing_ok=True)

    def recall(
        self, client: str, run: str, before: int | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """Return the arrays of the last round, or of the last one before ``before``; maybe none.

        Raises
        ------
        InvalidValue
            The file cannot be read.
        """
        kept = [n for n in self._rounds(client, run) if before is None or n < before]
        if not kept:
            return {}
        path = self.path(client, run, kept[-1])
        try:
            return dict(load(path.read_bytes()))
        except Exception as error:  # safetensors' own error type is private to it.
            raise InvalidValue(
                "local arrays", str(path), f"a readable safetensors file ({error})"
            ) from error

    def _rounds(self, client: str, run: str) -> list[int]:
        found = self._folder.glob(f"{name_of_run(client, run)}-*.safetensors")
        return sorted(int(path.stem.rpartition("-")[2]) for path in found)
