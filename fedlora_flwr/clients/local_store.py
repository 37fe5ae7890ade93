"""Arrays that stay with a client from round to round, on disk (FedSA-LoRA, arXiv 2410.01463)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.files import name_of_run, private_folder, replace_file

_KEPT = 3  # rounds: the current one, and two that a server may return to


class LocalStore:
    """Files for each client and run; a deployed client is a new process for every message.

    A server that was killed asks for a round again, so what was there before the last rounds is
    kept as well.

    Parameters
    ----------
    folder : Path
        Where the files are; made when something is first kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, client: str, run: str, server_round: int = 0) -> Path:
        """Return a client's file of a round; any text is a valid client or run."""
        return self._folder / f"{name_of_run(client, run)}-{server_round:09d}.safetensors"

    def keep(
        self,
        client: str,
        run: str,
        arrays: Mapping[str, NDArray[np.float32]],
        server_round: int = 0,
    ) -> None:
        """Keep what a round left, atomically; what later rounds left is forgotten."""
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
        """Return what was kept last, or last before a round; nothing before the first time.

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
