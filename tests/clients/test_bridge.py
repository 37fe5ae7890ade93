from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from fedlora_flwr.clients.bridge import bridge
from fedlora_flwr.clients.device import client_identity
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies import FedLoRA

Floats = NDArray[np.float64]
START: dict[str, Floats] = {
    "blocks.0.fc.lora_A.weight": np.arange(6.0).reshape(2, 3),
    "blocks.0.fc.lora_B.weight": np.zeros((4, 2)),
    "head.bias": np.array([3.0]),
}
A_NAME, B_NAME, HEAD = START


class AddOwnNumber(NumPyClient):
    """Adds its partition's number plus one to every array; knows nothing of this package."""

    def __init__(self, partition: int) -> None:
        self.step = partition + 1.0

    def fit(self, parameters: list[Any], config: Mapping[str, Any]) -> tuple[list[Any], int, Any]:
        arrays = [array + self.step for array in parameters]
        return arrays, 10, {"loss": 1 / self.step, "note": "fine", "round": config["server-round"]}

    def evaluate(
        self, parameters: list[Any], config: Mapping[str, Any]
    ) -> tuple[float, int, dict[str, Any]]:
        return float(parameters[-1][0]), 5, {"accuracy": 0.5}


class OnlyB(AddOwnNumber):
    """Uploads B and the head, in an order of its own, and says so."""

    def fit(self, parameters: list[Any], config: Mapping[str, Any]) -> tuple[list[Any], int, Any]:
        arrays = dict(zip(str(config["array-names"]).split(","), parameters, strict=True))
        names = [HEAD, B_NAME]
        return [arrays[name] + self.step for name in names], 1, {"array-names": ",".join(names)}


def app_of(kind: type[AddOwnNumber], bridged: bool = True) -> ClientApp:
    def client_fn(context: Context) -> Any:
        return kind(int(context.node_config["partition-id"])).to_client()

    return ClientApp(client_fn, mods=[bridge] if bridged else [])


def record() -> ArrayRecord:
    return ArrayRecord({name: Array(array.astype(np.float32)) for name, array in START.items()})


def values(arrays: ArrayRecord) -> dict[str, Floats]:
    return {name: array.numpy().astype(np.float64) for name, array in arrays.items()}


def ask(
    app: ClientApp, message_type: str = "train", content: RecordDict | None = None
) -> RecordDict:
    grid = LocalGrid(app, 1, {})
    with grid.running():
        content = content or RecordDict(
            {"arrays": record(), "config": ConfigRecord({"server-round": 3})}
        )
        (node,) = grid.get_node_ids()
        (reply,) = grid.send_and_receive([Message(content, node, message_type)])
    if reply.has_error():
        raise RuntimeError(reply.error.reason)
    return reply.content


def test_a_plain_numpy_client_under_a_stock_strategy() -> None:
    with LocalGrid(app_of(AddOwnNumber), 3, {}).running() as grid:
        result = FedAvg(fraction_evaluate=1.0).start(grid, record(), num_rounds=2)
    assert list(result.arrays) == list(START)
    for name, array in values(result.arrays).items():
        np.testing.assert_allclose(array, START[name] + 2 * (1 + 2 + 3) / 3)
    assert result.train_metrics_clientapp[2]["loss"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert result.evaluate_metrics_clientapp[2]["loss"] == pytest.approx(7.0)
    assert result.evaluate_metrics_clientapp[2]["accuracy"] == 0.5


def test_a_plain_numpy_client_under_our_strategy() -> None:
    with LocalGrid(app_of(AddOwnNumber), 3, {}).running() as grid:
        strategy = FedLoRA(weighting="size")
        result = strategy.start(grid, record(), num_rounds=1)
    for name, array in values(result.arrays).items():
        np.testing.assert_allclose(array, START[name] + 2)
    assert strategy.last_round is not None
    clients = [upload.client for upload in strategy.last_round.uploads]
    assert clients == [f"partition-{number:06d}" for number in range(3)]


def test_a_reply_keeps_names_metrics_texts_and_says_who_sent_it() -> None:
    content = ask(app_of(AddOwnNumber))
    assert set(content) == {"arrays", "metrics", "config"}
    assert list(content.array_records["arrays"]) == list(START)
    assert dict(content.metric_records["metrics"]) == {"loss": 1.0, "round": 3, "num-examples": 10}
    assert dict(content.config_records["config"]) == {"note": "fine", "client": "partition-000000"}


def test_a_partial_upload_is_named_by_the_client() -> None:
    arrays = values(ask(app_of(OnlyB)).array_records["arrays"])
    assert list(arrays) == [HEAD, B_NAME]
    np.testing.assert_array_equal(arrays[HEAD], START[HEAD] + 1)
    np.testing.assert_array_equal(arrays[B_NAME], START[B_NAME] + 1)


def test_the_names_leave_the_metrics() -> None:
    content = ask(app_of(OnlyB))
    assert "array-names" not in content.config_records["config"]


def test_an_empty_upload() -> None:
    class Nothing(AddOwnNumber):
        def fit(self, parameters: list[Any], config: Mapping[str, Any]) -> tuple[Any, int, Any]:
            return [], 0, {"array-names": "", "status": "budget-exhausted"}

    content = ask(app_of(Nothing))
    assert list(content.array_records["arrays"]) == []
    assert content.metric_records["metrics"]["num-examples"] == 0


def test_arrays_without_names_of_their_own_are_refused() -> None:
    class TwoOfThree(AddOwnNumber):
        def fit(self, parameters: list[Any], config: Mapping[str, Any]) -> tuple[Any, int, Any]:
            return parameters[:2], 1, {}

    with pytest.raises(RuntimeError, match="one for each of 3 names"):
        ask(app_of(TwoOfThree))


def test_flags_and_bytes_travel_with_the_texts() -> None:
    class Flag(AddOwnNumber):
        def fit(self, parameters: list[Any], config: Mapping[str, Any]) -> tuple[Any, int, Any]:
            return parameters, 1, {"converged": True, "note": "x", "raw": b"y"}

    content = ask(app_of(Flag))
    assert dict(content.metric_records["metrics"]) == {"num-examples": 1}
    assert content.config_records["config"]["converged"] is True
    assert content.config_records["config"]["raw"] == b"y"


class Crash(AddOwnNumber):
    """Fails as libraries do, with a piece of a record in the message."""

    def fit(self, parameters: list[Any], config: Mapping[str, Any]) -> tuple[Any, int, Any]:
        raise ValueError("could not convert 'Jane Doe, diabetes' to float")


def test_what_a_library_says_about_records_stays_on_the_client(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(RuntimeError, match="ValueError on the client") as caught:
        ask(app_of(Crash))
    assert "Jane" not in str(caught.value)
    assert "Jane" in caplog.text


def test_neither_does_a_legacy_server_hear_of_records() -> None:
    content = RecordDict(
        {
            "fitins.parameters": ArrayRecord({"0": Array(np.zeros(1))}),
            "fitins.config": ConfigRecord({}),
        }
    )
    with pytest.raises(RuntimeError, match="ValueError on the client") as caught:
        ask(app_of(Crash), content=content)
    assert "Jane" not in str(caught.value)


def test_errors_of_this_package_are_told() -> None:
    class Refuse(AddOwnNumber):
        def fit(self, parameters: list[Any], config: Mapping[str, Any]) -> tuple[Any, int, Any]:
            raise InvalidValue("rank", 0, "a number above 0")

    with pytest.raises(RuntimeError, match="InvalidValue: rank = 0"):
        ask(app_of(Refuse))


def test_a_status_that_is_not_ok_is_an_error() -> None:
    from flwr.client import Client
    from flwr.common import Code, FitIns, FitRes, Status

    class Unable(Client):
        def fit(self, ins: FitIns) -> FitRes:
            status = Status(Code.FIT_NOT_IMPLEMENTED, "cannot fit today")
            return FitRes(status, ndarrays_to_parameters([]), 0, {})

    with pytest.raises(RuntimeError, match="cannot fit today"):
        ask(ClientApp(lambda _: Unable(), mods=[bridge]))


@pytest.mark.parametrize("number", [0, 2])
def test_a_message_with_other_than_one_record_of_arrays_is_refused(number: int) -> None:
    content = RecordDict({f"arrays-{i}": record() for i in range(number)})
    content["config"] = ConfigRecord({})
    with pytest.raises(RuntimeError, match=f"The message has {number} ArrayRecords"):
        ask(app_of(AddOwnNumber), content=content)


def test_a_record_that_nobody_reads_is_refused() -> None:
    content = RecordDict({"arrays": record(), "config": ConfigRecord({})})
    content["metrics"] = MetricRecord({"loss": 1.0})
    with pytest.raises(RuntimeError, match="The message has 1 MetricRecords"):
        ask(app_of(AddOwnNumber), content=content)


def test_a_panic_of_a_library_in_rust_is_an_error_like_any_other() -> None:
    class Panic(BaseException):
        """Panics have no other base, and their text may hold a piece of a record."""

    class Panics(AddOwnNumber):
        def fit(self, parameters: list[Any], config: Mapping[str, Any]) -> tuple[Any, int, Any]:
            raise Panic("byte index 3 is not a char boundary; it is inside 'é' of `Jané Doe`")

    with pytest.raises(RuntimeError, match="Panic on the client") as caught:
        ask(app_of(Panics))
    assert "Doe" not in str(caught.value)


def test_a_query_is_answered_with_who_the_client_is() -> None:
    content = ask(app_of(AddOwnNumber), "query", RecordDict())
    assert set(content) == {"config"}
    assert dict(content.config_records["config"]) == {"client": "partition-000000"}


@pytest.mark.parametrize(
    ("node_config", "identity"),
    [
        ({"partition-id": 7, "num-partitions": 9}, "partition-000007"),
        ({"client-id": "ward-3", "partition-id": 7}, "ward-3"),
    ],
)
def test_identities(node_config: dict[str, Any], identity: str) -> None:
    context = Context(1, 2, node_config, RecordDict(), {})
    assert client_identity(context) == identity


def test_a_node_without_an_identity_is_refused() -> None:
    with pytest.raises(InvalidValue, match="'device', 'client-id' or 'partition-id'"):
        client_identity(Context(1, 2, {"path": "/data"}, RecordDict(), {}))


@pytest.mark.parametrize("bridged", [True, False])
def test_a_legacy_server_is_served_as_without_the_bridge(bridged: bool) -> None:
    seen: list[list[Any]] = []

    class Watched(LegacyFedAvg):
        def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
            assert not failures
            seen.extend(parameters_to_ndarrays(result.parameters) for _, result in results)
            return super().aggregate_fit(server_round, results, failures)

    def server_fn(_: Context) -> ServerAppComponents:
        strategy = Watched(
            fraction_evaluate=0.0,
            initial_parameters=ndarrays_to_parameters(list(START.values())),
            on_fit_config_fn=lambda server_round: {"server-round": server_round},
        )
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=1))

    with LocalGrid(app_of(AddOwnNumber, bridged), 2, {}).running() as grid:
        cast(Any, ServerApp(server_fn=server_fn))(grid, grid.context())
    assert sorted(arrays[-1][0] for arrays in seen) == [4.0, 5.0]
    assert all(len(arrays) == len(START) for arrays in seen)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_legacy_message_with_a_record_that_nobody_reads_is_refused(kind: str) -> None:
    prefix = "fitins" if kind == "train" else "evaluateins"
    content = RecordDict(
        {
            f"{prefix}.parameters": record(),
            f"{prefix}.config": ConfigRecord({"server-round": 1}),
            "more": ConfigRecord({"task": "digits"}),
        }
    )
    with pytest.raises(RuntimeError, match=r"records that are not read: \['more'\]"):
        ask(app_of(AddOwnNumber), kind, content)
