"""The configuration of a message, and which records a message of which kind holds."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from tests.hostile.conftest import MakeDevice
from tests.hostile.device import RUN, Device, records, start
from tests.hostile.orders import ORDER_KEYS, examples, order_configs, scalars
from tests.hostile.support import KINDS, legacy
from tests.hostile.tiny_task import RECORDS

_SMALL: list[dict[str, Any]] = [{}, {"server-round": 1}, {"x": [1, 2]}, {"x": b"\x80"}]
LEGACY = [
    "fitins.parameters", "fitins.config", "evaluateins.parameters", "evaluateins.config",
    "getparametersins.config", "getpropertiesins.config", "fitres.parameters", "arrays", "config",
    "metrics", "", "x",
]  # fmt: skip


def test_each_key_of_an_order_and_what_is_no_key(spent: Device) -> None:
    for key, values in ORDER_KEYS.items():
        for value in values:
            for kind in ("train", "evaluate"):
                spent.ask(kind, records(start(4), {key: value}))

    @examples(2_000)
    @given(order_configs(), st.sampled_from(["train", "train", "train", "evaluate"]))
    def sent(config: dict[str, Any], kind: str) -> None:
        assert spent.ask(kind, records(start(4), config)).kind != "ok"

    sent()
    assert spent.sent >= 2_000, spent.sent
    assert spent.kinds["refused"] > 1_000
    assert spent.kinds["budget-exhausted"] > 10


def test_every_kind_of_message_with_any_records(spent: Device) -> None:
    arrays = st.sampled_from(
        [{}, start(4), start(3), {"head.bias": start(4)["head.bias"]}, {"": start(4)["head.bias"]}]
    )
    configs = st.one_of(
        st.just({}), st.just({"server-round": 1, "plan": "*"}), order_configs(),
        st.dictionaries(st.text(max_size=10), scalars, max_size=3),
    )  # fmt: skip
    metrics = st.dictionaries(st.sampled_from(["loss", "x"]), st.floats(), max_size=2)
    record = st.one_of(
        arrays.map(lambda found: records(found, {}).array_records["arrays"]),
        arrays.map(lambda found: records(found, {}).array_records["arrays"]),
        configs.map(ConfigRecord),
        configs.map(ConfigRecord),
        metrics.map(lambda found: MetricRecord(dict(found))),
    )
    contents = st.dictionaries(st.sampled_from(LEGACY), record, max_size=4).map(RecordDict)
    likely = st.builds(legacy, st.sampled_from(["fitins", "evaluateins"]), arrays, configs)

    @examples(1_500)
    @given(st.sampled_from(KINDS), st.one_of(contents, likely))
    def sent(kind: str, content: RecordDict) -> None:
        answer = spent.ask(kind, content)
        if kind not in ("query", "get_parameters", "get_properties"):
            assert answer.kind != "ok"

    sent()
    for kind in KINDS:
        spent.ask(kind)
        spent.ask(kind, records(start(4), {}))
    for kind in ("get_parameters", "get_properties"):
        for config in _SMALL:
            spent.ask(
                kind, RecordDict({f"{kind.replace('_', '')}ins.config": ConfigRecord(config)})
            )
    assert spent.sent >= 1_500, spent.sent
    assert spent.kinds["ok"] > 50


def test_the_legacy_records_train_with_the_same_reply(make_device: MakeDevice) -> None:
    device = make_device(ledger_scope="run")
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "ok"), ({"plan": "*"}, "ok"), ({"plan": "A"}, "ok"),
        ({"plan": "B/A", "server-round": 3}, "ok"), ({"array-names": ",".join(start(4))}, "ok"),
        ({"array-names": "head.bias"}, "refused"), ({"x": 1}, "refused"),
        ({"plan": [1]}, "failed"), ({"plan": 1}, "refused"), ({"share": "A"}, "ok"),
    ]  # fmt: skip
    for number, (config, kind) in enumerate(cases):
        content = legacy("fitins", start(4), config)
        assert device.ask("train", content, run_id=100 + number).kind == kind, config


def test_a_device_that_names_a_split_gives_its_figures_and_no_others(
    make_device: MakeDevice,
) -> None:
    device = make_device(test_split="public")
    shared = device.order(share="A", server_round=1)
    answer = device.ask("evaluate", shared)
    assert answer.kind == "ok"
    assert (
        device.ask("evaluate", shared, {**RUN, "test-split": "records"}).content == answer.content
    )
    assert device.ask("evaluate", legacy("evaluateins", start(4), {"share": "A"})).kind == "ok"
    for config in ({}, {"share": ""}, {"plan": "*"}, {"share": "A", "loss": 1}):
        assert device.ask("evaluate", records(start(4), config)).kind == "refused"
    for changes in (
        {"test-limit": 1},
        {"eval-batch-size": 1},
        {"report-unprotected-metrics": True},
    ):
        assert device.ask("evaluate", shared, {**RUN, **changes}).content == answer.content
        unshared = device.ask("evaluate", device.order(), {**RUN, **changes})
        assert unshared.kind == "refused"


@pytest.mark.parametrize("own", ["uniform", "size", "inverse-noise"])
def test_the_device_says_whether_its_size_or_noise_is_told(
    make_device: MakeDevice, own: str
) -> None:
    device = make_device(weighting=own)
    for asked in ("uniform", "size", "inverse-noise"):
        run = {**RUN, "weighting": asked}
        for content in (device.order(plan="*", weighting=asked), device.order(plan="*")):
            wanted = content.config_records["config"].get("weighting", "uniform")
            answer = device.ask("train", content, run)
            assert answer.kind == ("ok" if wanted in ("uniform", own) else "refused")
            if answer.kind == "ok" and wanted == "size":
                assert answer.numbers["weight"] == answer.numbers["num-examples"] == RECORDS
