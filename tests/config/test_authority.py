from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from fedlora_flwr.config import Decider, RunConfig
from fedlora_flwr.config.authority import in_force, markdown, rows
from fedlora_flwr.config.keys import fields_by_key
from fedlora_flwr.config.names import full_name
from fedlora_flwr.config.on_device import Limit
from fedlora_flwr.wire.order import Order
from fedlora_flwr.wire.report import Report

PRIVACY = Path(__file__).parents[2] / "docs" / "privacy.md"


def test_every_key_and_every_field_has_a_row() -> None:
    found = [(row.where, row.key) for row in rows()]
    keys = [key for where, key in found if where == "configuration"]
    assert keys == [*map(full_name, fields_by_key(RunConfig)), "<method>.<setting>"]
    orders = [entry.metadata["key"] for entry in fields(Order)]
    assert [key for where, key in found if where == "order"] == ["arrays", *orders]
    reports = [key for where, key in found if where == "report"]
    assert len(reports) == len(fields(Report))
    assert {"client", "epsilon", "array-names", "further notes"} - set(reports) == {"array-names"}
    assert len(found) == len(set(found))


def test_every_row_says_who_decides_what_is_accepted_and_why() -> None:
    deciders = {str(decider) for decider in Decider}
    for row in rows():
        assert row.decides in deciders
        assert row.accepted
        assert row.why[0].isupper()
        assert row.why.endswith(".")


def test_the_documents_table_is_the_codes() -> None:
    begin, end = "<!-- fedlora keys --who-decides -->\n", "<!-- end of the table -->"
    text = PRIVACY.read_text(encoding="utf-8")
    assert text.split(begin)[1].split(end)[0] == markdown()


@pytest.mark.parametrize(
    "key",
    [
        "task", "model", "dataset", "dataset-subset", "train-split", "test-split", "test-limit",
        "train-limit", "input-columns", "label-column", "num-classes", "class-names", "epsilon",
        "delta", "ledger-scope", "state-dir", "secure-noise", "reproducible", "weighting",
        "report-unprotected-metrics",
    ],
)  # fmt: skip
def test_a_server_never_decides_over_records_budget_and_state(key: str) -> None:
    (row,) = [row for row in rows() if row.where == "configuration" and row.key == full_name(key)]
    assert row.decides == Decider.DEVICE


def test_a_devices_own_table_says_what_is_in_force() -> None:
    limits = {"rank": Limit.read("rank", 8)}
    found = dict(in_force({"epsilon": 3.0}, limits))
    assert found["privacy.epsilon"] == "3.0, its file"
    assert found["privacy.ledger-scope"] == "'lifetime', default, not set in its file"
    assert found["partition.partitioner"] == "'iid', always"
    assert found["lora.rank"] == "the run, at most 8"
    assert found["privacy.clip-norm"].startswith("the run, a number from")
