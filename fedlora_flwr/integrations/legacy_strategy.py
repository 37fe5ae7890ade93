"""Any FedLoRA strategy as a `flwr.server.strategy.Strategy`, for ``ServerApp(server_fn=...)``.

Legacy records carry no array names. The names travel in the configuration, and back in the metrics,
under ``array-names``, where `LoRAClient` and `follow_fit` read and write them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import INFO
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common import (
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    NDArrays,
    Parameters,
    Scalar,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.common.logger import log
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedlora_flwr.errors import BudgetsSpent, FederationAborted, InvalidValue
from fedlora_flwr.flower_internals import ErrorCode, GridClientProxy
from fedlora_flwr.strategies.base import FedLoRA
from fedlora_flwr.strategies.identities import KnownNode, KnowsNodes
from fedlora_flwr.strategies.reasons import reason_of
from fedlora_flwr.wire import LOSS, NAMES
from fedlora_flwr.wire.arrays import from_numpy, record_of, to_numpy
from fedlora_flwr.wire.records import evaluate_content, fit_content

EvaluateFn = Callable[[int, NDArrays, dict[str, Scalar]], tuple[float, dict[str, Scalar]] | None]
Res = TypeVar("Res", FitRes, EvaluateRes)

# Finds a client's own message in the text that Flower's proxy puts around it.
_CLIENTS_WORDS = re.compile(r"\(reason: (.*)\)\. It originated", re.DOTALL)


class LegacyStrategy(Strategy):
    """Lets a FedLoRA strategy serve a legacy ``ServerApp(server_fn=...)``.

    The wrapped strategy makes all decisions: the plan, the cohort, checks of uploads, the count of
    replies, completion, the ledger watch and the merge into the global arrays. Make a new
    `LegacyStrategy` for each run.

    Parameters
    ----------
    strategy : FedLoRA
        Any strategy that has not served a run.
    initial_arrays : Mapping[str, ndarray]
        The arrays before training, by name. Legacy records get their names from here.
    num_rounds : int
        Number of rounds, the same as in ``ServerConfig``, which Flower does not show to a legacy
        strategy.
    evaluate_fn : callable, optional
        As for Flower's legacy strategies: (round, arrays, config) to (loss, metrics). The names of
        the arrays are in ``config["array-names"]``.

    Raises
    ------
    InvalidValue
        ``num_rounds`` is below 1, or the strategy has served another run.

    Examples
    --------
    >>> from flwr.client import NumPyClient
    >>> from flwr.clientapp import ClientApp
    >>> from flwr.server import ServerApp, ServerAppComponents, ServerConfig
    >>> from fedlora_flwr import DPLoRA, LocalGrid
    >>> class AddsOne(NumPyClient):
    ...     def fit(self, parameters, config):
    ...         return [array + 1 for array in parameters], 1, {}
    >>> start = {"fc.lora_A.weight": np.ones((2, 3)), "fc.lora_B.weight": np.zeros((4, 2))}
    >>> def evaluate(server_round, arrays, config):
    ...     print(dict(zip(config["array-names"].split(","), (float(a.sum()) for a in arrays))))
    >>> def server_fn(context):
    ...     strategy = LegacyStrategy(DPLoRA(), start, 1, evaluate)
    ...     return ServerAppComponents(strategy=strategy, config=ServerConfig(1))
    >>> app = ClientApp(lambda context: AddsOne().to_client())
    >>> with LocalGrid(app, 2, {}).running() as grid:
    ...     ServerApp(server_fn=server_fn)(grid, grid.context())
    {'fc.lora_A.weight': 6.0, 'fc.lora_B.weight': 0.0}
    {'fc.lora_A.weight': 12.0, 'fc.lora_B.weight': 8.0}
    """

    def __init__(
        self,
        strategy: FedLoRA,
        initial_arrays: Mapping[str, NDArray[np.floating]],
        num_rounds: int,
        evaluate_fn: EvaluateFn | None = None,
    ) -> None:
        super().__init__()
        if num_rounds < 1:
            raise InvalidValue("num_rounds", num_rounds, "at least 1")
        if strategy.last_round is not None:
            raise InvalidValue("strategy", type(strategy).__name__, "a new one for each run")
        strategy.num_rounds = num_rounds
        self.strategy = strategy
        self._initial = {name: np.array(array) for name, array in initial_arrays.items()}
        self._names = tuple(self._initial)
        self._evaluate_fn = evaluate_fn
        self._sent: dict[int, Message] = {}
        self._open_round: int | None = None
        self._over = False

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters:
        """Return the initial arrays."""
        return ndarrays_to_parameters(list(self._initial.values()))

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Draw the cohort and send it arrays, names and plan (see `FedLoRA.configure_train`).

        Once no client has budget left, the remaining rounds ask nobody: Flower's legacy server
        cannot be told to stop.
        """
        self._check_aggregated()
        named, grid = self._named(parameters), _grid(client_manager)
        try:
            messages = self.strategy.configure_train(server_round, named, ConfigRecord(), grid)
        except BudgetsSpent as end:
            log(INFO, "Nobody trains any more. %s", end)
            self._sent, self._over = {}, True
            return []
        self._open_round = server_round
        return self._to_proxies(messages, client_manager, FitIns)

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Check, count, average and merge the uploads (see `FedLoRA.aggregate_train`).

        Raises
        ------
        FederationAborted
            As the strategy's own; or uploads come as a secure sum that the strategy cannot use.
        """
        self._open_round = None
        self._check_secure_sum(server_round, results)
        replies = self._replies(results, failures, _fit_content)
        arrays, metrics = self.strategy.aggregate_train(server_round, replies)
        if arrays is None:
            return None, {}
        self._names = tuple(arrays)
        values = [to_numpy(array) for array in arrays.values()]
        return ndarrays_to_parameters(values), _scalars(metrics)

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Ask clients for metrics if the strategy does (see ``fraction_evaluate``)."""
        if self._over:
            return []
        messages = self.strategy.configure_evaluate(
            server_round, self._named(parameters), ConfigRecord(), _grid(client_manager)
        )
        return self._to_proxies(messages, client_manager, EvaluateIns)

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Average the clients' metrics, as the strategy does."""
        if not self._sent:
            return None, {}
        replies = self._replies(results, failures, _evaluate_content)
        metrics = _scalars(self.strategy.aggregate_evaluate(server_round, replies))
        return cast("float | None", metrics.pop(LOSS, None)), metrics

    def evaluate(
        self, server_round: int, parameters: Parameters
    ) -> tuple[float, dict[str, Scalar]] | None:
        """Call ``evaluate_fn`` with the global arrays.

        Raises
        ------
        FederationAborted
            Flower's workflow gave up on the round before and passed on none of its uploads.
        """
        self._check_aggregated()
        if self._evaluate_fn is None:
            return None
        config: dict[str, Scalar] = {NAMES: ",".join(self._names)}
        return self._evaluate_fn(server_round, parameters_to_ndarrays(parameters), config)

    def _named(self, parameters: Parameters) -> ArrayRecord:
        values = parameters_to_ndarrays(parameters)
        if len(values) != len(self._names):
            raise InvalidValue("global arrays", len(values), f"one for each of {self._names}")
        named = zip(self._names, values, strict=True)
        return record_of({name: from_numpy(array) for name, array in named})

    def _to_proxies(
        self,
        messages: Iterable[Message],
        client_manager: ClientManager,
        kind: Callable[[Parameters, dict[str, Scalar]], Any],
    ) -> list[tuple[ClientProxy, Any]]:
        """Turn messages to nodes into instructions for proxies, and remember the messages."""
        self._sent = {message.metadata.dst_node_id: message for message in messages}
        proxies = _proxies(client_manager)
        return [(proxies[node], kind(*_legacy(sent))) for node, sent in self._sent.items()]

    def _replies(
        self,
        results: Sequence[tuple[ClientProxy, Res]],
        failures: Sequence[tuple[ClientProxy, Res] | BaseException],
        content_of: Callable[[Message, Res], RecordDict],
    ) -> list[Message]:
        """Turn results and failures into replies to the messages that were sent."""
        replies, unanswered = [], dict(self._sent)
        for proxy, result in results:
            sent = unanswered.pop(_node(proxy), None)
            if sent is None:  # Flower gives each proxy one result.
                continue
            try:
                replies.append(Message(content_of(sent, result), reply_to=sent))
            except Exception as error:  # One client's reply must not end the others' round.
                replies.append(_error(str(error), sent))
        for failure in failures:
            if isinstance(failure, tuple):
                proxy, result = failure
                replies.append(_error(result.status.message, unanswered.pop(_node(proxy))))
        # Flower does not say which client an exception comes from, so each client without an
        # answer gets all texts. One missing client, or one text, leaves no doubt.
        raised = sorted({_words(f) for f in failures if isinstance(f, BaseException)})
        text = raised[0] if len(raised) == 1 else "one of: " + " | ".join(raised)
        return replies + [_error(text, sent) for sent in unanswered.values() if raised]

    def _check_aggregated(self) -> None:
        """Refuse to continue from a round that Flower has silently dropped."""
        if self._open_round is not None:
            raise FederationAborted(
                f"Round {self._open_round}: no upload was handed to the strategy. Flower's "
                "workflow gave up, and its log says why. For secure aggregation the client's mods "
                "are [secaggplus_mod, bridge], in this order."
            )

    def _check_secure_sum(self, server_round: int, results: Sequence[tuple[Any, FitRes]]) -> None:
        """Refuse a secure sum unless the strategy's aggregate is a mean by number of examples."""
        # Flower's SecAgg workflows give all results the one object that holds the mean.
        if len(results) < 2 or len({id(result.parameters) for _, result in results}) > 1:
            return
        name, reason = type(self.strategy).__name__, ""
        if self.strategy.needs_each_upload:
            reason = f"{name} needs each upload: use a strategy that averages, such as RoLoRA"
        elif self.strategy.weighting == "inverse-noise":
            reason = "weighting = 'inverse-noise' would not be used: set 'uniform' or 'size'"
        if reason:
            raise FederationAborted(
                f"Round {server_round}: secure aggregation hands over one mean, by number of "
                f"examples. {reason}."
            )


class _Nodes:
    """The nodes that a client manager knows, with the methods of a Grid that a strategy uses."""

    def __init__(self, client_manager: ClientManager) -> None:
        self._proxies = _proxies(client_manager)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._proxies)

    def known_nodes(self) -> Mapping[int, KnownNode]:
        """Return what the run's grid knows of the nodes."""
        return self._grid.known_nodes() if isinstance(self._grid, KnowsNodes) else {}

    @property
    def bindings(self) -> Path | None:
        """The file in which the run's grid keeps the identities of nodes."""
        return self._grid.bindings if isinstance(self._grid, KnowsNodes) else None

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages through the grid: proxies cannot ask nodes for their identities."""
        return cast(Grid, self._grid).send_and_receive(messages, timeout=timeout)

    @property
    def _grid(self) -> object:
        return next((proxy.grid for proxy in self._proxies.values()), None)


def _grid(client_manager: ClientManager) -> Grid:
    return cast(Grid, _Nodes(client_manager))


def _proxies(client_manager: ClientManager) -> dict[int, GridClientProxy]:
    found = cast("Iterable[GridClientProxy]", client_manager.all().values())
    return {proxy.node_id: proxy for proxy in found}


def _node(proxy: ClientProxy) -> int:
    return cast(GridClientProxy, proxy).node_id


def _arrays(message: Message) -> ArrayRecord:
    (record,) = message.content.array_records.values()
    return record


def _legacy(message: Message) -> tuple[Parameters, dict[str, Scalar]]:
    """Return a message's arrays without their names, and its configuration with them."""
    arrays = _arrays(message)
    (config,) = message.content.config_records.values()
    values = [to_numpy(array) for array in arrays.values()]
    scalars = cast(dict[str, Scalar], {**config, NAMES: ",".join(arrays)})
    return ndarrays_to_parameters(values), scalars


def _fit_content(sent: Message, result: FitRes) -> RecordDict:
    values = parameters_to_ndarrays(result.parameters)
    return fit_content(values, _arrays(sent), result.metrics, result.num_examples)


def _evaluate_content(_: Message, result: EvaluateRes) -> RecordDict:
    return evaluate_content(result.loss, result.metrics, result.num_examples)


def _scalars(metrics: MetricRecord | None) -> dict[str, Scalar]:
    return {k: v for k, v in (metrics or {}).items() if isinstance(v, int | float)}


def _error(reason: str, sent: Message) -> Message:
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=sent)


def _words(failure: BaseException) -> str:
    """Return a client's own message, without the text of Flower's proxy."""
    inner = failure.args[0] if failure.args else None
    text = str(inner.reason if isinstance(inner, Error) else failure)
    match = _CLIENTS_WORDS.search(text)
    return reason_of(match[1] if match else text)
