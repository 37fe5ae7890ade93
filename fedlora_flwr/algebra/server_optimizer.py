"""The server's optimizer: it moves the model by the mean of the clients' updates, in pure NumPy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.algebra.means import Arrays, merge
from fedlora_flwr.algebra.optimizer_names import OPTIMIZERS, USUAL_RATES
from fedlora_flwr.errors import InvalidValue


class ServerOptimizer:
    """Moves the global arrays by a gradient-like update, the mean of what clients have changed.

    Let x be an array of the model and Δ the mean of the uploads minus x. Each entry follows

    - ``"momentum"``: m ← β₁ m + Δ, and x ← x + η m;
    - ``"adam"``: m ← β₁ m + (1 - β₁) Δ, v ← β₂ v + (1 - β₂) Δ², and x ← x + η m / (√v + τ);
    - ``"yogi"``: as Adam, but v ← v - (1 - β₂) Δ² sign(v - Δ²).

    At first m = 0 and v = τ². As in the paper, no term corrects for these starting values. The
    equations are Algorithm 2 of Reddi et al. (arXiv 2003.00295), and momentum is its FedAvgM.

    Each array has a state of its own, in fp64. An array that did not train in a round has no Δ: it
    keeps its bits, and its state rests, too. A Δ of zero would be false, since the factor was not
    asked, and it would let the moments shrink while other factors train.

    Uploads are released already, and the state is made of them. So this is post-processing and
    costs no privacy.

    Parameters
    ----------
    name : str (default: "none")
        One of `OPTIMIZERS`.
    lr : float (default: 0)
        Learning rate η; 0 for the usual one (`USUAL_RATES`).
    beta_1 : float (default: 0.9)
        Decay β₁ of the momentum, or of the first moment.
    beta_2 : float (default: 0.99)
        Decay β₂ of the second moment.
    tau : float (default: 1e-3)
        τ: added to the root of the second moment. A smaller one adapts more.

    Raises
    ------
    InvalidValue
        There is no such optimizer, or a number is out of range.

    Examples
    --------
    >>> server = ServerOptimizer("momentum", beta_1=0.5)
    >>> x = {"w": np.array([0.0])}
    >>> for _ in range(3):  # Each round's mean is one above the model.
    ...     x = server.step(x, {"w": x["w"] + 1.0}, ["w"])
    >>> x["w"].tolist()  # The steps are 1, 1.5 and 1.75.
    [4.25]
    """

    def __init__(
        self,
        name: str = "none",
        lr: float = 0.0,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
    ) -> None:
        if name not in OPTIMIZERS:
            raise InvalidValue("server-optimizer", name, f"one of {OPTIMIZERS}")
        if not 0 <= lr < np.inf:
            raise InvalidValue("server-lr", lr, "a number above 0, or 0 for the usual rate")
        for key, beta in (("server-beta-1", beta_1), ("server-beta-2", beta_2)):
            if not 0 <= beta < 1:
                raise InvalidValue(key, beta, "a number from 0 to below 1")
        if not 0 < tau < np.inf:
            raise InvalidValue("server-tau", tau, "a number above 0")
        self.name, self._lr = name, lr or USUAL_RATES[name]
        self._beta_1, self._beta_2, self._tau = beta_1, beta_2, tau
        self.reset()

    @property
    def steps(self) -> bool:
        """Whether the model becomes anything else than the mean of the uploads."""
        return self.name != "none"

    def reset(self) -> None:
        """Forget the state."""
        self._first: dict[str, NDArray[np.float64]] = {}
        self._second: dict[str, NDArray[np.float64]] = {}

    def step(
        self, current: Arrays, mean: Arrays, trained: Iterable[str]
    ) -> dict[str, NDArray[np.floating]]:
        """Return the next global arrays.

        Parameters
        ----------
        current : Arrays
            The global arrays that the clients started from.
        mean : Arrays
            All global arrays after the uploads were averaged.
        trained : Iterable[str]
            The names of what trained. All other arrays of ``mean`` are returned unchanged.

        Returns
        -------
        dict[str, ndarray]
            All global arrays, in their own types.
        """
        if not self.steps:
            return dict(mean)
        moved: dict[str, NDArray[np.floating]] = {}
        for name in trained:
            before = np.asarray(current[name], np.float64)
            after = before + self._move(name, np.asarray(mean[name], np.float64) - before)
            moved[name] = after.astype(mean[name].dtype)
        return merge(mean, moved)

    def _move(self, name: str, delta: NDArray[np.float64]) -> NDArray[np.float64]:
        """Take an array's Δ into its state, and return its step."""
        first = self._beta_1 * self._first.get(name, np.zeros_like(delta))
        if self.name == "momentum":
            self._first[name] = first + delta
            return self._lr * self._first[name]
        self._first[name] = first + (1 - self._beta_1) * delta
        square = delta * delta
        second = self._second.get(name, np.full_like(delta, self._tau * self._tau))
        if self.name == "adam":
            second = self._beta_2 * second + (1 - self._beta_2) * square
        else:
            second = second - (1 - self._beta_2) * square * np.sign(second - square)
        self._second[name] = second
        return self._lr * self._first[name] / (np.sqrt(second) + self._tau)

    def state_dict(self) -> dict[str, Any]:
        """Return the state between rounds: NumPy arrays by name."""
        return {"first": dict(self._first), "second": dict(self._second)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._first, self._second = dict(state["first"]), dict(state["second"])
