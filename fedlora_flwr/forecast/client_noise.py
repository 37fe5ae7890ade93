"""The client with the most noise, apart from the mean of all: one tiny client is not the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.unit import RECORD, counted
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.server.noise import noise_shares, noise_to_signal

# A client decides if the mean without it has less than two thirds of the noise.
_DECIDES = 1.5
_EQUAL = 1.1


@dataclass(frozen=True)
class WorstClient:
    """The client whose own upload has the most noise.

    Parameters
    ----------
    client : int
        Its number.
    records : int
        n: its private records, or the users of them.
    alone : float
        The noise of its upload over the largest signal that the upload can hold.
    share : float
        Its share of the noise variance of a round's weighted mean.
    without : float or None
        The noise-to-signal ratio of the mean of all other clients; ``None`` if there are none.
    unit : str
        What is counted: records or users.
    """

    client: int
    records: int
    alone: float
    share: float
    without: float | None
    unit: str = RECORD

    def stands_out(self, clients: int) -> bool:
        """Tell whether it brings more noise than an equal part of that of all clients."""
        return self.share * clients > _EQUAL

    def decides(self, ratio: float) -> bool:
        """Tell whether the noise of the mean, which is ``ratio``, is mostly that of this client."""
        return self.without is not None and ratio > _DECIDES * self.without

    def __str__(self) -> str:
        """Say it in a few words."""
        return (
            f"worst client ({self.client}, {counted(self.records, self.unit)}) alone "
            f"{self.alone:.2f} ×, with {self.share:.0%} of the mean's noise"
        )

    def warning(self, ratio: float) -> str:
        """Return a warning that this client decides the noise of the mean, which is ``ratio``."""
        return (
            f"Client {self.client} ({counted(self.records, self.unit)}) brings {self.share:.0%} of "
            f"the noise of a round's mean, which is {ratio:.1f} times the largest signal with it "
            f"and {self.without or 0:.1f} times without it. Set weighting = 'size' or "
            "'inverse-noise', so that its noise counts less, or leave out such clients with a "
            "larger min-records."
        )


def worst_client(
    config: RunConfig, mechanisms: Sequence[Mechanism | None], coordinates: float
) -> WorstClient | None:
    """Find the client with the most noise.

    Parameters
    ----------
    config : RunConfig
        The run.
    mechanisms : Sequence[Mechanism or None]
        Each client's mechanism, by its number; ``None`` where it cannot keep its promise.
    coordinates : float
        As for `fedlora_flwr.server.noise.noise_to_signal`.

    Returns
    -------
    WorstClient or None
        ``None`` without noise, or where clients share the noise of a sum.
    """
    able = {client: made for client, made in enumerate(mechanisms) if made is not None}
    if not config.private or config.secure_sum or not able:
        return None
    shares = dict(zip(able, noise_shares(config, [*able.values()]).tolist(), strict=True))
    worst = max(able, key=lambda client: able[client].noise_multiplier)
    others = [made for client, made in able.items() if client != worst]
    alone = noise_to_signal(config, [able[worst]], coordinates)
    without = noise_to_signal(config, others, coordinates) if others else None
    size = able[worst].num_records
    return WorstClient(worst, size, alone or 0.0, shares[worst], without, config.unit)
