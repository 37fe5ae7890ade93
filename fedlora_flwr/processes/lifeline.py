"""Processes that end with this one, however it ends: by an error, a signal, or a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedlora_flwr.terminal import uninterrupted

KEEPER = Path(__file__).with_name("keeper.py")
_PATIENCE = 60.0


@contextmanager
def scratch(prefix: str = "fedlora-", where: Path | None = None) -> Iterator[Path]:
    """Make a temporary folder that goes with this process, also if it is killed.

    Parameters
    ----------
    prefix : str (default: "fedlora-")
        How its name begins.
    where : Path, optional
        The folder to make it in; by default that of temporary files.
    """
    with tempfile.TemporaryDirectory(prefix=prefix, dir=where) as folder, Lifeline() as lifeline:
        lifeline.start(clear=Path(folder))
        yield Path(folder)


class Lifeline:
    """Ties processes to this one.

    Each is started by a keeper (see `fedlora_flwr.processes.keeper`). When the lifeline is cut, the
    keeper ends the process and all processes that it has started. The kernel cuts the lifeline when
    this process ends, so no cleanup can be forgotten. On Linux, daemons are ended too; on other
    systems, only processes that stay in their group.
    """

    def __init__(self) -> None:
        self._far, near = os.pipe()
        self._open = [self._far, near]
        self._keepers: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Lifeline:
        """Return the lifeline. It starts no process yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """See `cut`."""
        self.cut()

    def start(
        self,
        command: Sequence[str] = (),
        *,
        clear: Path | None = None,
        last_words: tuple[Path, str] | None = None,
        **settings: Any,
    ) -> subprocess.Popen[Any]:
        """Start a command.

        Parameters
        ----------
        command : Sequence[str]
            Program and arguments. Empty for a keeper that only cleans up.
        clear : Path, optional
            A folder to remove at the end.
        last_words : tuple[Path, str], optional
            A file and its text. The file is written at the end unless it exists.
        **settings
            Arguments of `subprocess.Popen`, except ``stdin``.

        Returns
        -------
        subprocess.Popen
            The keeper, which exits with the command's exit code.
        """
        order = {
            "command": list(command),
            "clear": clear and str(clear),
            "last_words": last_words and (str(last_words[0]), last_words[1]),
        }
        keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", str(KEEPER), json.dumps(order)],
            stdin=self._far,
            start_new_session=True,
            **settings,
        )
        self._keepers.append(keeper)
        return keeper

    def cut(self) -> None:
        """End all started processes, and wait until they have ended."""
        with uninterrupted():
            while self._open:
                os.close(self._open.pop())
            for keeper in self._keepers:
                with suppress(subprocess.TimeoutExpired):  # The kernel may delay a process's end.
                    keeper.wait(_PATIENCE)
