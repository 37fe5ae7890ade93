"""Warns once of clients that make no promise that the server knows of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from logging import WARNING
from typing import TYPE_CHECKING

from flwr.common.logger import log

from fedlora_flwr.errors import FedLoRAError
from fedlora_flwr.wire import EPSILON
from fedlora_flwr.wire.report import Report

if TYPE_CHECKING:
    from fedlora_flwr.strategies.replies import Upload

_OLD_CODE = (
    "Let the client answer with answer_message. If it does already, Flower still runs the code of "
    "an earlier folder: stop its process flower-superlink, and start the run again"
)
_PAGE = "docs/how_to/use_in_my_flower_project.md shows how a project's clients train privately."


def check_report(numbers: Mapping[str, float], only_private: bool) -> None:
    """Refuse an upload whose client reports no ε, where all clients must train privately.

    Raises
    ------
    FedLoRAError
        There is none.
    """
    if only_private and EPSILON not in numbers:
        raise FedLoRAError(
            f"it reports no {EPSILON}, so its code is not the private client. {_OLD_CODE}"
        )


class PromiseWatch:
    """Looks at what clients report of their privacy; each warning is given once in a run.

    A strategy averages what any Flower client sends. Whether noise protects it, only the client
    knows, and a client of this package says so by its ε.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()

    def look_at_training(self, uploads: Iterable[Upload]) -> None:
        """Warn of uploads without ε."""
        silent = [upload.client for upload in uploads if EPSILON not in upload.metrics]
        if silent:
            more = f" and {len(silent) - 1} more" if len(silent) > 1 else ""
            self._warn(
                "training",
                f"{silent[0]}{more} reported no {EPSILON}: nothing says that their uploads are "
                f"private. {_PAGE}",
            )

    def look_at_figures(self, reports: Sequence[tuple[str, Report]], weighted_by: str) -> None:
        """Warn of figures that clients measured on records of their own."""
        names = {str(name) for _, report in reports for name in report.numbers()}
        if found := sorted(names - {weighted_by}):
            self._warn(
                "figures",
                f"Clients reported figures of their own: {', '.join(found)}. No noise protects "
                "them, so they tell about private records that they were measured on. Leave "
                "fraction_evaluate at 0, and evaluate on public records.",
            )

    def _warn(self, what: str, text: str) -> None:
        if what not in self._told:
            self._told.add(what)
            log(WARNING, "%s", text)
