"""Whether a server's certificates outlast a run, by the dates in them and the speed of its rounds.

A certificate that ends stops each device, the operator and the run itself at once. So the run says
in its log when one ends within a week of its start, or before its forecast end.
"""

from __future__ import annotations

import statistics
from datetime import UTC, datetime, timedelta
from logging import WARNING
from pathlib import Path

from cryptography import x509
from flwr.common.logger import log

from fedlora_flwr.server.rounds import RoundRow

SOON = timedelta(days=7)
_FILES = {
    "server.pem": (
        "server's certificate",
        "Run `fedlora deploy renew FLEET` on the operator's machine, carry server.pem and "
        "server.key to the server, and start the server again. Then continue the run with resume.",
    ),
    "ca.pem": (
        "certificate of the fleet's CA",
        "It cannot be renewed: make a new fleet with `fedlora deploy init`, and carry its ca.pem "
        "to every device.",
    ),
}


class Certificates:
    """The certificates of the server that runs this process, as they are when it starts.

    Parameters
    ----------
    folder : Path
        The server's folder. A file of it that is missing or cannot be read is left out.
    num_rounds : int
        Rounds of the run.
    """

    def __init__(self, folder: Path, num_rounds: int) -> None:
        self._num_rounds = num_rounds
        self._ends = {name: end for name in _FILES if (end := _end_of(folder / name))}
        self._seconds: list[float] = []

    def at_start(self) -> None:
        """Warn of each certificate that ends within seven days."""
        now = datetime.now(UTC)
        for name, end in list(self._ends.items()):
            if end < now + SOON:
                self._warn(name, "is about to end" if end > now else "has ended", "")

    def after_round(self, row: RoundRow) -> None:
        """Warn, once, of each certificate that ends before the rounds that are left would."""
        if not row["round"]:
            return
        self._seconds.append(row["seconds"])
        # The first round has waited for devices, so its time counts as one of several.
        left, each = self._num_rounds - row["round"], statistics.median(self._seconds)
        now = datetime.now(UTC)
        for name, end in list(self._ends.items()):
            if left * each > (end - now).total_seconds() and left:
                rest = f" before this run does: {left} rounds are left, of about {each:.0f} s each"
                self._warn(name, "will end", rest)

    def _warn(self, name: str, what: str, rest: str) -> None:
        subject, fix = _FILES[name]
        end = f"{self._ends.pop(name):%Y-%m-%d}"
        log(WARNING, "The %s %s (%s)%s. %s", subject, what, end, rest, fix)


def _end_of(file: Path) -> datetime | None:
    try:
        return x509.load_pem_x509_certificate(file.read_bytes()).not_valid_after_utc
    except (OSError, ValueError):  # `fedlora deploy check` tells what is wrong with it.
        return None
