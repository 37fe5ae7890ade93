from __future__ import annotations

import random

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedlora_flwr.errors import FederationAborted, FedLoRAError, InvalidValue
from fedlora_flwr.strategies import FedLoRA, FFALoRA, RoLoRA
from tests.strategies.tiny import (
    NAMES,
    Asked,
    Tiny,
    arrays_of,
    honest,
    record_of,
    reply_of,
    start_arrays,
)


def weighted(asked: Asked) -> RecordDict:
    """Answer with the array of this partition's number, and with a weight of its own."""
    arrays = {name: np.full_like(v, asked.partition) for name, v in asked.trained().items()}
    return reply_of(arrays, asked.partition, weight=float(10**asked.partition))


def test_a_partial_upload_is_merged_into_the_last_arrays() -> None:
    tiny = Tiny(3)
    final = arrays_of(tiny.run(FFALoRA()).arrays)
    uploads = [arrays_of(content.array_records["arrays"]) for content in tiny.uploads]
    assert list(final) == list(NAMES)
    for name, array in start_arrays().items():
        if name in uploads[0]:
            array = np.mean([upload[name] for upload in uploads], axis=0, dtype=np.float64)
        np.testing.assert_allclose(final[name], array, rtol=1e-6)


def test_replies_in_any_order_give_the_same_bits() -> None:
    results = set()
    for seed in range(4):
        tiny, strategy = Tiny(6), RoLoRA()
        with tiny.grid() as grid:
            messages = list(
                strategy.configure_train(1, record_of(start_arrays()), ConfigRecord(), grid)
            )
            replies = list(grid.send_and_receive(messages))
            random.Random(seed).shuffle(replies)
            arrays, _ = strategy.aggregate_train(1, replies)
        assert arrays is not None
        results.add(b"".join(array.data for array in arrays.values()))
    assert len(results) == 1


@pytest.mark.parametrize("weighting", ["size", "inverse-noise"])
def test_weights_of_the_clients_are_used(weighting: str) -> None:
    tiny = Tiny(3, weighted)
    final = arrays_of(tiny.run(FedLoRA(weighting=weighting)).arrays)
    expected = (1 * 0 + 10 * 1 + 100 * 2) / 111
    for array in final.values():
        np.testing.assert_allclose(array, expected, rtol=1e-6)
    assert {entry.weighting for entry in tiny.asked} == {weighting}


def test_uniform_weighting_ignores_what_clients_say() -> None:
    final = arrays_of(Tiny(3, weighted).run(FedLoRA()).arrays)
    for array in final.values():
        np.testing.assert_allclose(array, 1.0, rtol=1e-6)


def test_size_weighting_takes_the_number_of_examples_of_plain_clients() -> None:
    def answer(asked: Asked) -> RecordDict:
        content = weighted(asked)
        metrics = content.metric_records["metrics"]
        metrics["num-examples"] = 1 + asked.partition
        del metrics["weight"]
        return content

    final = arrays_of(Tiny(3, answer).run(FedLoRA(weighting="size")).arrays)
    for array in final.values():
        np.testing.assert_allclose(array, (2 * 1 + 3 * 2) / 6, rtol=1e-6)


def test_the_largest_epsilon_is_reported() -> None:
    strategy = FedLoRA()
    result = Tiny(4).run(strategy)
    assert result.train_metrics_clientapp[1]["epsilon"] == 3.0
    assert result.train_metrics_clientapp[1]["num-examples"] == 1.0
    assert strategy.last_round is not None
    assert strategy.last_round.epsilon_max == 3.0


def test_arrays_travel_in_single_precision() -> None:
    tiny, strategy = Tiny(2), FFALoRA()
    with tiny.grid() as grid:
        doubles = {name: array.astype(np.float64) for name, array in start_arrays().items()}
        result = strategy.start(grid, record_of(doubles), num_rounds=2)
    assert {array.dtype for array in result.arrays.values()} == {"float32"}
    assert tiny.asked[-1].dtypes == {"float32"}


def test_bytes_are_those_of_the_records() -> None:
    tiny, strategy = Tiny(3), RoLoRA()
    tiny.run(strategy)
    report = strategy.last_round
    assert report is not None
    down = sum(len(array.data) for array in record_of(start_arrays()).values())
    up = [sum(len(a.data) for a in c.array_records["arrays"].values()) for c in tiny.uploads]
    assert report.bytes_down == 3 * down
    assert report.bytes_up == sum(up)
    assert report.bytes_up < report.bytes_down
    assert report.bytes_plain == 6 * down


def test_every_message_of_a_round_carries_the_plan() -> None:
    tiny = Tiny(2)
    tiny.run(RoLoRA(), num_rounds=2)
    plans = [(entry.server_round, str(entry.plan)) for entry in tiny.asked]
    assert plans == [(1, "B"), (1, "B"), (2, "A"), (2, "A")]


def test_the_positional_arguments_of_fedavg() -> None:
    strategy = FedLoRA(0.5, 0.25, 3, 4, 5, "examples", "model", "settings")
    assert strategy.fraction_train == 0.5
    assert strategy.fraction_evaluate == 0.25
    assert strategy.min_train_nodes == 3
    assert strategy.min_evaluate_nodes == 4
    assert strategy.min_available_nodes == 5
    assert strategy.weighted_by_key == "examples"
    assert strategy.arrayrecord_key == "model"
    assert strategy.configrecord_key == "settings"


def test_record_keys_are_those_asked_for() -> None:
    strategy = FedLoRA(arrayrecord_key="model", configrecord_key="settings")
    with Tiny(2).grid() as grid:
        messages: list[Message] = list(
            strategy.configure_train(1, record_of(start_arrays()), ConfigRecord(), grid)
        )
    assert {*messages[0].content.array_records} == {"model"}
    assert {*messages[0].content.config_records} == {"settings"}


@pytest.mark.parametrize(
    ("key", "value"),
    [("min_completion", -0.1), ("min_completion", 1.1), ("weighting", "bytes")],
)
def test_arguments_out_of_range_are_refused(key: str, value: object) -> None:
    with pytest.raises(InvalidValue, match=key):
        FedLoRA(**{key: value})  # type: ignore[arg-type]


def test_too_few_nodes_abort_instead_of_waiting_for_ever() -> None:
    with pytest.raises(FederationAborted, match=r"2 of at least 3 nodes connected in 0 s"):
        Tiny(2).run(FedLoRA(min_available_nodes=3, node_timeout=0.0))


def test_arrays_without_lora_factors_are_refused() -> None:
    with Tiny(2).grid() as grid, pytest.raises(InvalidValue, match="array names"):
        FedLoRA().start(grid, ArrayRecord({"w": record_of(start_arrays())["head.bias"]}))


def test_replies_of_a_round_that_was_not_sent_are_refused() -> None:
    with pytest.raises(FedLoRAError, match="Call configure_train before"):
        FedLoRA().aggregate_train(1, [])


def test_metrics_that_some_clients_lack_are_left_out() -> None:
    def answer(asked: Asked) -> RecordDict:
        content = honest(asked)
        if asked.partition == 1:
            content.metric_records["metrics"]["extra"] = 5.0
        return content

    metrics = Tiny(3, answer).run(FedLoRA()).train_metrics_clientapp[1]
    assert set(metrics) == {"num-examples", "epsilon"}
