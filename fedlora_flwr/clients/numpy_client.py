"""`LocalRound` as a Flower NumPyClient, for servers and projects on that interface."""

from __future__ import annotations

import numpy as np
from flwr.client import NumPyClient
from numpy.typing import NDArray

from fedlora_flwr.clients.local_round import LocalRound
from fedlora_flwr.wire.order import Order, named_arrays

Scalars = dict[str, bool | bytes | float | int | str]
Reply = tuple[list[NDArray[np.float32]], int, Scalars]


class LoRAClient(LocalRound, NumPyClient):
    """A client that trains the planned LoRA factors on its own records, privately.

    A thin adapter: `LocalRound` does the work, holds the guarantees and documents the parameters.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from fedlora_flwr import Ledger, LocalTrainer, RunConfig
    >>> trainer = LocalTrainer.build(RunConfig(task="digits", device="cpu", local_steps=1))
    >>> records = trainer.task.client_records(0, 10)
    >>> with TemporaryDirectory() as folder:
    ...     ledger = Ledger(Path(folder) / "ledger.sqlite")
    ...     client = LoRAClient(trainer, records, ledger, client="hospital-7", run="run-1")
    ...     start, order = client.get_parameters({}), {"server-round": 1, "plan": "B"}
    ...     arrays, _, metrics = client.fit(start, order)
    >>> len(arrays), round(metrics["epsilon"], 2)
    (10, 2.68)
    """

    def get_parameters(self, config: Scalars) -> list[NDArray[np.float32]]:
        """Return the arrays before training, which depend on the seed and not on any record."""
        return list(self.start.values())

    def fit(self, parameters: list[NDArray[np.float32]], config: Scalars) -> Reply:
        """Train one round and release the result.

        Parameters
        ----------
        parameters : list[ndarray]
            The server's arrays, in the order of the names in ``config``, or else of the model's.
        config : dict
            The order, as scalars (see `Order`).

        Returns
        -------
        tuple
            The released arrays, the number of examples, and everything else that is released.

        Raises
        ------
        OrderRefused, InvalidValue, BudgetExhausted
            See `LocalRound.run`; or the order or the arrays cannot be read.
        """
        released = self.run(*self._read(parameters, config))
        return released.report().to_fit()

    def evaluate(
        self, parameters: list[NDArray[np.float32]], config: Scalars
    ) -> tuple[float, int, Scalars]:
        """Evaluate the model, with the factor that this client keeps if there is one.

        Raises
        ------
        OrderRefused
            See `LocalRound.measure`; or the order or the arrays cannot be read.
        """
        metrics = self.measure(*self._read(parameters, config))
        return metrics["loss"], 1, dict(metrics)

    def _read(
        self, parameters: list[NDArray[np.float32]], config: Scalars
    ) -> tuple[Order, dict[str, NDArray[np.float32]]]:
        order = Order.from_config(config)
        names = order.names.split(",") if order.names else list(self.start)
        return order, named_arrays(names, parameters)
