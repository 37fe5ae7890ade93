"""Arrays that stay with a client from round to round, on disk (FedSA-LoRA, arXiv 2410.01463)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.files import name_of_run, private_folder, replace_file


class LocalStore:
    """One file for each client and run; a deployed client is a new process for every message.

    Parameters
    ----------
    folder : Path
        Where the files are; made when something is first kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, client: str, run: str) -> Path:
        """Return a client's file in a run; any text is a valid client or run."""
        return self._folder / f"{name_of_run(client, run)}.safetensors"

    def keep(self, client: str, run: str, arrays: Mapping[str, NDArray[np.float32]]) -> None:
        """Replace what is kept, atomically."""
        private_folder(self._folder)
        content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        replace_file(self.path(client, run), content)

    def recall(self, client: str, run: str) -> dict[str, NDArray[np.float32]]:
        """Return what was kept last; nothing before the first time.

        Raises
        ------
        InvalidValue
            The file cannot be read.
        """
        path = self.path(client, run)
        if not path.exists():
            return {}
        try:
            return dict(load(path.read_bytes()))
        except Exception as error:  # safetensors' own error type is private to it.
            raise InvalidValue(
                "local arrays", str(path), f"a readable safetensors file ({error})"
            ) from error
