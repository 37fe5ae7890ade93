"""What a round does against uploads that are meant to do harm.

Two checks protect the model from an upload. A *limit* refuses an upload that no honest client
sends. A *rule* takes the place of the mean, so that a few uploads cannot move it far; the method
then aggregates the rule's result as it would the opened sum of a secure sum, as one upload.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.algebra.means import Arrays, weighted_mean
from fedlora_flwr.algebra.robust import krum, median, squared_distances, trimmed_mean
from fedlora_flwr.config.sections.federation import RULES
from fedlora_flwr.errors import FederationAborted, InvalidValue
from fedlora_flwr.layout import by_part
from fedlora_flwr.strategies.replies import RoundReport, Upload
from fedlora_flwr.wire.order import Order

MEAN = "none"
_FAR = 4.0  # times the median distance from the result, beyond which a client is named


class Limit(Protocol):
    """Knows what an honest client can send."""

    def check(self, order: Order, current: Arrays, upload: Upload) -> None:
        """Refuse an upload that no honest client sends.

        Raises
        ------
        SuspectReply
            It is such an upload.
        """
        ...


@dataclass(frozen=True)
class Robust:
    """How a strategy treats its uploads.

    Parameters
    ----------
    rule : str (default: "none")
        ``"none"``, the mean, or one of `RULES`.
    share : float (default: 0.2)
        Share of a round's clients that may be bad, below 1/2, for trimmed means and Krum.
    limit : Limit, optional
        Refuses uploads one by one.

    Raises
    ------
    InvalidValue
        There is no such rule, or the share is out of range.

    Examples
    --------
    >>> uploads = [Upload(str(x), {"head": np.array([x])}, 1.0, {}) for x in (1.0, 2.0, 900.0)]
    >>> report = RoundReport(1, "*", sent=3)
    >>> (merged,) = Robust("median").merged({"head": np.zeros(1)}, uploads, report)
    >>> merged.arrays["head"].tolist()
    [2.0]
    """

    rule: str = MEAN
    share: float = 0.2
    limit: Limit | None = None

    def __post_init__(self) -> None:
        if self.rule not in (MEAN, *RULES):
            raise InvalidValue("robust", self.rule, f"one of {(MEAN, *RULES)}")
        if not 0 < self.share < 0.5:
            raise InvalidValue("robust-share", self.share, "a number above 0 and below 0.5")

    @property
    def means(self) -> bool:
        """Whether uploads are averaged."""
        return self.rule == MEAN

    @property
    def words(self) -> str:
        """What is done, as a run's summary says it."""
        parts = (["norm-bound"] if self.limit else []) + ([] if self.means else [self.rule])
        return ", ".join(parts) or MEAN

    def bad(self, clients: int, caught: int = 0) -> int:
        """Return how many of a number of clients may be bad, apart from those that were caught."""
        return max(0, math.ceil(self.share * clients - 1e-9) - caught)

    def least(self, clients: int, caught: int = 0) -> int:
        """Return how many uploads the rule needs where a number of clients are asked."""
        if self.means:
            return 1
        if self.rule == "median":
            return 3
        return 2 * self.bad(clients, caught) + (3 if self.rule == "krum" else 1)

    def check_cohort(
        self, asked: int, needs_each: bool, found: int | None = None, caught: int = 0
    ) -> None:
        """Refuse a round that the rule cannot work with.

        Parameters
        ----------
        asked : int
            Clients asked.
        needs_each : bool
            Whether the method's aggregation needs each upload.
        found : int, optional
            Uploads that can be used, once they have come; before, all that were asked.
        caught : int (default: 0)
            Bad clients whose uploads the limit has refused, so that fewer are left.

        Raises
        ------
        FederationAborted
            There is no mean that the rule could replace, or there are too few uploads.
        """
        if not self.means and needs_each:
            raise FederationAborted(
                f"robust = {self.rule!r} replaces a mean of uploads, but this method's aggregation "
                "needs each upload. Set robust = 'none' or 'norm-bound', or choose a method that "
                "averages."
            )
        count, least = asked if found is None else found, self.least(asked, caught)
        if asked and count < least:
            what = "clients were asked" if found is None else f"of {asked} uploads can be used"
            raise FederationAborted(
                f"{count} {what}, but robust = {self.rule!r} with robust-share = {self.share:g} "
                f"needs at least {least}. Ask more clients, lower robust-share, or set another "
                "rule."
            )

    def check(self, order: Order, current: Arrays, upload: Upload) -> None:
        """Refuse an upload that is beyond the limit, if there is one.

        Raises
        ------
        SuspectReply
            No honest client sends it.
        """
        if self.limit is not None:
            self.limit.check(order, current, upload)

    def merged(self, current: Arrays, uploads: list[Upload], report: RoundReport) -> list[Upload]:
        """Return what the method is to aggregate.

        Each part (A, B, head) is treated on its own: their updates are of different sizes, and a
        client may be honest in one alone.

        Parameters
        ----------
        current : Arrays
            The global arrays that the clients started from.
        uploads : list[Upload]
            Ordered by client, all with arrays of the same names and shapes.
        report : RoundReport
            The round. Clients that are far from the result are named in it.

        Returns
        -------
        list[Upload]
            The uploads themselves where they are averaged; else one upload, the rule's result.

        Raises
        ------
        FederationAborted
            There are too few uploads.
        """
        if self.means or not uploads:
            return uploads
        caught = len(report.suspects)  # Until now, only the limit has named any.
        self.check_cohort(report.sent, False, found=len(uploads), caught=caught)
        arrays: dict[str, NDArray[np.floating]] = {}
        for names in by_part(uploads[0].arrays).values():
            found = self._part(names, current, uploads, self.bad(report.sent, caught))
            arrays.update(found)
            report.suspect(_far(uploads, found))
        return [Upload(self.rule, {n: arrays[n] for n in uploads[0].arrays}, 1.0, {})]

    def _part(
        self, names: Sequence[str], current: Arrays, uploads: Sequence[Upload], bad: int
    ) -> dict[str, NDArray[np.floating]]:
        weights = [upload.weight for upload in uploads]
        if self.rule == "krum":
            moved = ([u.arrays[n] - current[n] for u in uploads] for n in names)
            gaps = np.sum([squared_distances(rows) for rows in moved], axis=0)
            kept = [uploads[i] for i in krum(gaps, bad)]
            chosen = [{n: u.arrays[n] for n in names} for u in kept]
            return weighted_mean(chosen, [upload.weight for upload in kept])
        found: dict[str, NDArray[np.floating]] = {}
        for name in names:
            stack = np.stack([upload.arrays[name] for upload in uploads])
            middle = (
                median(stack, weights)
                if self.rule == "median"
                else trimmed_mean(stack, weights, bad)
            )
            found[name] = middle.astype(stack.dtype)
        return found


def _far(uploads: Sequence[Upload], center: Arrays) -> list[str]:
    """Name the clients that are several times farther from a result than the median client."""
    gaps = [
        math.sqrt(sum(float(np.sum((u.arrays[n] - center[n]) ** 2.0)) for n in center))
        for u in uploads
    ]
    usual = float(np.median(gaps))
    return [u.client for u, gap in zip(uploads, gaps, strict=True) if gap > _FAR * usual]
