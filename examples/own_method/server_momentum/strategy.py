"""Momentum on the server: each round goes on a little in the direction of the one before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr import FedLoRA
from fedlora_flwr.strategies import Upload, between, setting

Arrays = Mapping[str, NDArray[np.floating]]


@dataclass(frozen=True)
class Settings:
    """One setting; more are more lines."""

    beta: float = setting(0.5, between(0, 0.99), "share of the last round's movement that is kept")


class ServerMomentum(FedLoRA):
    """Average A and B, and add ``beta`` times the movement of the round before (arXiv 1909.06335).

    What is added is made of uploads, so it costs no privacy.
    """

    name: ClassVar[str] = "server-momentum"
    settings: ClassVar[type] = Settings
    needs_each_upload: ClassVar[bool] = False
    beta: float

    def begin(self) -> None:
        """Stand still before the first round."""
        super().begin()
        self._movement: dict[str, NDArray[np.floating]] = {}

    def aggregate(
        self, server_round: int, current: Arrays, uploads: Sequence[Upload]
    ) -> dict[str, NDArray[np.floating]]:
        """Move to the mean, and on."""
        mean = super().aggregate(server_round, current, uploads)
        for name in mean:
            kept = self.beta * self._movement.get(name, np.zeros_like(mean[name]))
            self._movement[name] = mean[name] - current[name] + kept
        return {name: current[name] + self._movement[name] for name in mean}

    def state_dict(self) -> dict[str, Any]:
        """Add the movement, without which a run that was saved could not go on."""
        return {**super().state_dict(), "movement": dict(self._movement)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the movement, too."""
        super().load_state_dict(state)
        self._movement = dict(state["movement"])
