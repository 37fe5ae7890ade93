"""How the rounds of a run follow each other: from the first, or after some that are done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from logging import INFO
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from fedlora_flwr.errors import InvalidValue, RunOver, StoppedEarly
from fedlora_flwr.places import FLOWERS, STRATEGIES, load_strategy
from fedlora_flwr.strategies.exchange import Exchange

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
StopFn = Callable[[], str]
"""Returns why a run ends before its next round, or an empty text."""


class Running(Exchange):
    """Flower's loop over the rounds, which may end early and may continue an earlier run.

    Attributes
    ----------
    num_rounds : int
        Rounds of the run.
    continues : str
        Identity of the run that this one continues, under which clients count; empty for none.
    """

    num_rounds: int
    continues: str = ""

    def begin(self) -> None:
        """Reset what is carried between rounds to its state before the first round."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
        *,
        done: int | None = None,
        stop_fn: StopFn | None = None,
    ) -> Result:
        """Run the federation, as Flower's strategies do, until nobody has budget left.

        Parameters
        ----------
        grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn
            As of `flwr.serverapp.strategy.Strategy.start`.
        done : int, optional
            Rounds that are done: the run continues after them, from ``initial_arrays`` and from the
            state that was loaded. By default it is a new run.
        stop_fn : callable, optional
            Asked after each evaluation, and before a run continues; returns why the run ends here,
            or an empty text. Needs ``evaluate_fn``.

        Returns
        -------
        Result
            Arrays and metrics of the rounds that took place.

        Raises
        ------
        InvalidValue
            The command that started the run names another strategy than this one.
        """
        check_named(self, grid.run.override_config)
        self.num_rounds, self._timeout = num_rounds, timeout
        self._result = Result(arrays=initial_arrays) if done else Result()
        rest = timeout, train_config, evaluate_config
        evaluate = keeping(self._result, evaluate_fn, stop_fn)
        try:
            if done is None:
                self.begin()
                return super().start(grid, initial_arrays, num_rounds, *rest, evaluate)
            ends_if_told(stop_fn)
            later = _Later(self, done)
            later.start(grid, initial_arrays, num_rounds - done, *rest, later.numbered(evaluate))
        except RunOver as end:
            log(INFO, "The run ends here. %s", end)
        return self._result


def check_named(strategy: Exchange, given: Mapping[str, Any]) -> None:
    """Refuse a run whose command names one strategy of this package while another one runs.

    A project may make its strategy from a class, and its users then find that the key does nothing.

    Parameters
    ----------
    strategy : Exchange
        What runs. A class of the project's own may inherit from what is named.
    given : Mapping[str, Any]
        The values that were given to ``flwr run`` with ``--run-config``.

    Raises
    ------
    InvalidValue
        Another strategy is named.
    """
    named = given.get("strategy", given.get("federation.strategy"))
    if named not in {**STRATEGIES, **FLOWERS}:
        return
    kind, wanted = type(strategy), load_strategy(named)
    own = not kind.__module__.startswith(f"{__package__}.")
    if kind is not wanted and not (own and issubclass(kind, wanted)):
        allowed = (
            f"the strategy that this ServerApp makes, a {kind.__name__}. Let it make the one that "
            "is named: strategy = fedlora_flwr.strategy_of(config)"
        )
        raise InvalidValue("strategy", named, allowed)


class _Later(FedAvg):
    """Lets Flower's loop, which counts from 1, run the later rounds of a strategy."""

    def __init__(self, strategy: Exchange, done: int) -> None:
        super().__init__()
        self._strategy, self._done = strategy, done

    def numbered(self, evaluate_fn: EvaluateFn | None) -> EvaluateFn | None:
        """Return an evaluation that gets a round's true number, and skips round 0."""
        if evaluate_fn is None:
            return None
        return lambda number, arrays: evaluate_fn(number + self._done, arrays) if number else None

    def summary(self) -> None:
        """Log what the strategy is."""
        self._strategy.summary()
        log(INFO, "\t└──> %d rounds are done; Flower counts the next ones from 1 again", self._done)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """See `FedLoRA.configure_train`."""
        return self._strategy.configure_train(server_round + self._done, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """See `FedLoRA.aggregate_train`."""
        return self._strategy.aggregate_train(server_round + self._done, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """See `Exchange.configure_evaluate`."""
        return self._strategy.configure_evaluate(server_round + self._done, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """See `Exchange.aggregate_evaluate`."""
        return self._strategy.aggregate_evaluate(server_round + self._done, replies)


def keeping(
    result: Result, evaluate_fn: EvaluateFn | None, stop_fn: StopFn | None = None
) -> EvaluateFn | None:
    """Return the same evaluation, which also keeps its metrics, and may end the run after it."""
    if evaluate_fn is None:
        return None

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        metrics = evaluate_fn(server_round, arrays)
        if metrics is not None:
            result.evaluate_metrics_serverapp[server_round] = metrics
        ends_if_told(stop_fn)
        return metrics

    return evaluate


def ends_if_told(stop_fn: StopFn | None) -> None:
    """End the run if there is a reason.

    Raises
    ------
    StoppedEarly
        There is one.
    """
    if stop_fn is not None and (why := stop_fn()):
        raise StoppedEarly(f"{why}.")
