"""The server's step under a secure sum: its optimizer uses the opened sum as a gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora_flwr.algebra.means import Arrays
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.lora.adapters import AdaptedModel
from fedlora_flwr.privacy.budget import Segment, calibrate
from fedlora_flwr.privacy.clip_weights import ClipWeights
from fedlora_flwr.privacy.postprocessing.filters import make_filter
from fedlora_flwr.privacy.postprocessing.optimizer import OptimizerSettings, PostProcessing
from fedlora_flwr.secure_sum.accounting import epsilon_unmasked
from fedlora_flwr.secure_sum.cohort import check_union, honest_shares
from fedlora_flwr.secure_sum.grid import Grid, fitting_norm, opened
from fedlora_flwr.server.masked_sum import MaskedSum
from fedlora_flwr.strategies.cohort import cohort_size
from fedlora_flwr.strategies.secure_sum import Ask
from fedlora_flwr.tasks.registry import Task, client_sizes
from fedlora_flwr.wire import NUM_EXAMPLES
from fedlora_flwr.wire.limits import Residues
from fedlora_flwr.wire.order import Order


class SumStep:
    """Opens sums and steps by them: an `Opener`.

    State of momentum, Adam and temporal filters lasts for the whole run: each factor's own,
    advanced in the rounds in which it trains.

    Parameters
    ----------
    config : RunConfig
        Rates, optimizer, filter, q, C and its weights, the dropouts and colluding clients.
    adapted : AdaptedModel
        The server's model, on which the steps are taken.
    grid : Grid
        The grid of each round (see `sum_grid`).
    records : int
        Largest number of records of all clients, for which the grid was made.
    """

    def __init__(self, config: RunConfig, adapted: AdaptedModel, grid: Grid, records: int) -> None:
        self.dropouts = config.dropouts
        self.noise_multiplier = sum_noise(config)
        self.grid_norm = grid.norm
        self._grid, self._records = grid, records
        self._sum = MaskedSum(config)
        self._config = config
        self._adapted = adapted
        self._post = PostProcessing(adapted)
        self._filter = make_filter(config.filter)
        self._optimizer = self._post.optimizer(OptimizerSettings.in_round(config, 1))
        self._deviation = grid.noise_multiplier * config.clip_norm
        self._weights = ClipWeights.configured(config)
        self._simulated: bool | None = None  # Unknown before the first sum.

    @property
    def remark(self) -> str:
        """What the run's summary says of the sum."""
        alone = f"one client's uploads would spend ε = {unmasked(self._config, self._grid):.3g}"
        if self._simulated is None:
            return f"not opened once. If masking failed, {alone}"
        if self._simulated:
            return f"simulated: this process sees every upload, and {alone}"
        return f"masked by the clients. If masking failed, {alone}"

    def state_dict(self) -> dict[str, Any]:
        """Return the state of optimizer and filter, by array: NumPy arrays and plain values.

        It also tells whether any sum was simulated.
        """
        state = self._optimizer.state
        return {
            "simulated": self._simulated,
            "optimizer": {
                name: {key: _plain(value) for key, value in state[parameter].items()}
                for name, parameter in self._adapted.parameters.items()
                if parameter in state
            },
            "filter": self._filter.state_dict(),
        }

    def load_state_dict(self, found: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._simulated = found["simulated"]
        self._filter.load_state_dict(found["filter"])
        for name, state in found["optimizer"].items():
            parameter = self._adapted.parameters[name]
            self._optimizer.state[parameter] = {
                key: _tensor(value, parameter) for key, value in state.items()
            }

    def agree(self, ask: Ask, order: Order, nodes: Sequence[int]) -> Mapping[int, Order]:
        """Return what to send to each client that can upload (see `MaskedSum.agree`)."""
        return self._sum.agree(ask, order, nodes)

    def total(
        self, ask: Ask, nodes: Sequence[int], shares: Mapping[str, Residues]
    ) -> dict[str, NDArray[np.int64]]:
        """Return the opened sum, by name.

        Raises
        ------
        InvalidValue
            The sum cannot be opened (see `MaskedSum.total`), or its record count is impossible.
        """
        total = self._sum.total(ask, nodes, shares)
        found = {name: opened(array) for name, array in total.items()}
        self._simulated = bool(self._simulated) or self._sum.simulated
        count = int(found[NUM_EXAMPLES][0])
        if not 1 <= count <= self._records:
            allowed = f"from 1 to {self._records} (sum-records). A client uploaded a false number"
            raise InvalidValue(f"{self._config.unit}s of all clients", count, allowed)
        return found

    def step(
        self, server_round: int, current: Arrays, total: Mapping[str, NDArray[np.int64]], count: int
    ) -> dict[str, NDArray[np.floating]]:
        """Divide the sum by the expected number of records and by the weights, and take one step.

        Parameters
        ----------
        server_round : int
            Round, from 1, which learning rates may depend on.
        current : Arrays
            The global arrays.
        total : Mapping[str, ndarray]
            The opened sum of what trained, in units of the grid.
        count : int
            Σn of the clients in the sum. The step divides by the expected number q·Σn, because
            the number of records that joined is private.

        Returns
        -------
        dict[str, ndarray]
            The arrays that trained, fp32.

        """
        config, adapted = self._config, self._adapted
        settings = OptimizerSettings.in_round(config, server_round)
        adapted.write(current)
        scale = config.clip_norm / (self.grid_norm * config.sample_rate * count)
        for name, parameter in adapted.parameters.items():
            parameter.requires_grad_(name in total)
            parameter.grad = None
            if name in total:
                mean = total[name] * (scale / self._weights.of(name))
                parameter.grad = torch.from_numpy(mean).to(parameter)
        deviation = self._deviation / (config.sample_rate * count)
        self._post(
            settings,
            self._filter,
            self._optimizer,
            # Not ``deviation ** 2``: on overflow it raises an error, while a product is infinite.
            lambda name: deviation * deviation / self._weights.of(name) ** 2,
        )
        factors = self._post.groups(settings)
        for group, factor in zip(self._optimizer.param_groups, factors, strict=True):
            group["lr"] = settings.rates[factor]
        self._optimizer.step()
        return adapted.read(list(total))


def _plain(value: Any) -> Any:
    return value.detach().cpu().numpy().copy() if isinstance(value, torch.Tensor) else value


def _tensor(value: Any, parameter: torch.Tensor) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    found = torch.tensor(value)
    # A count of steps has no shape, and torch keeps it on the CPU.
    return found.to(parameter.device) if found.ndim else found


def sum_noise(config: RunConfig) -> float:
    """Return σ of the sum, for the run's own budget and one mechanism on all records."""
    return calibrate(config.epsilon, config.delta, config.sample_rate, config.planned_steps)


def sum_grid(config: RunConfig, records: int, coordinates: int) -> Grid:
    """Work out a run's grid, and refuse a run that could not keep its promise.

    Parameters
    ----------
    config : RunConfig
        The run.
    records : int
        Number of records of all clients.
    coordinates : int
        Numbers that train.

    Raises
    ------
    InvalidValue
        δ is not below one over the number of records, too few clients share the noise, or the sum
        does not fit into 32 bits.
    """
    check_union(config.delta, records, config.unit)
    asked = cohort_size(config.num_clients, config.fraction_train)
    shares = honest_shares(asked, config.dropouts, config.colluding)
    if shares < config.least_shares:
        allowed = f"at most {shares}: of {asked} clients asked, dropouts and colluding do not count"
        raise InvalidValue("least-shares", config.least_shares, allowed)
    sigma = sum_noise(config)
    norm = fitting_norm(sigma, shares, asked, config.sample_rate * records, coordinates)
    grid = Grid.of(sigma, shares, norm)
    grid.check_slack(coordinates, config.planned_steps)
    return grid


def sum_step(config: RunConfig, task: Task, adapted: AdaptedModel) -> SumStep:
    """Make the opener of a run; count simulated clients' records if ``sum-records`` is not set.

    Raises
    ------
    InvalidValue
        See `sum_grid`.
    """
    size = sum(parameter.numel() for parameter in adapted.parameters.values())
    records = config.sum_records or int(client_sizes(config, task).sum())
    return SumStep(config, adapted, sum_grid(config, records, size), records)


def unmasked(config: RunConfig, grid: Grid) -> float:
    """Return the ε that one client's own uploads would spend if nothing hid them."""
    rounds = Segment(1.0, config.sample_rate, config.planned_steps)
    return epsilon_unmasked(grid.noise_multiplier, grid.shares, rounds, config.delta).epsilon
