from __future__ import annotations

from collections.abc import Sequence

import pytest

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.keys import fields_by_key
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.studies.compare_methods import ROW_KEYS, read_methods
from fedlora_flwr.studies.comparison import Comparison

SHARED = RunConfig.of({"num-rounds": 40, "rank": 8, "lora-alpha": 16})


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        (["dp-lora", "rolora", "dp-lora"], ["dp-lora", "rolora"]),
        (["dp-lora", "la-lora filter=binomial"], ["dp-lora", "la-lora, binomial"]),
        (
            ["la-lora", "dp-lora", "la-lora filter=binomial"],
            ["la-lora, no filter", "dp-lora", "la-lora, binomial"],
        ),
        (["dp-lora", "dp-lora filter=none"], ["dp-lora, no filter"]),
        (["rolora rank=4", "rolora"], ["rolora, rank 4", "rolora, rank 8"]),
        (["rolora clip-norm=1", "rolora clip-norm=1.0"], ["rolora, clip-norm 1"]),
        (
            ["rolora precondition=true", "rolora optimizer=adamw"],
            ["rolora, precondition, sgd", "rolora, no precondition, adamw"],
        ),
        (
            ["rolora weighting=size max-rounds=25", "rolora"],
            ["rolora, weighting size, max-rounds 25", "rolora, weighting uniform, max-rounds 0"],
        ),
        (["la-lora lr-b=.2 lr-a=1e-3", "la-lora"], ["la-lora, lr-b 0.2, lr-a 0.001", "la-lora"]),
        (["rolora 'lr-schedule=warmup:2 cosine:0'"], ["rolora, lr-schedule warmup:2 cosine:0"]),
        (["flexlora client-ranks=2,4"], ["flexlora, client-ranks 2,4"]),
    ],
)
def test_rows_are_named_for_what_they_ran(rows: Sequence[str], names: list[str]) -> None:
    assert [method.name for method in read_methods(rows, SHARED)] == names


def test_a_row_is_what_all_share_with_its_own_settings() -> None:
    (row,) = read_methods(["la-lora filter=ema lr-b=.2 rank=4"], SHARED)
    own = {"strategy": "la-lora", "filter": "ema", "lr-b": 0.2, "rank": 4}
    assert row.of(SHARED) == RunConfig.of({**SHARED.items(), **own})
    assert row.settings == {"filter": "ema", "lr-b": 0.2, "rank": 4}
    (plain,) = read_methods(["la-lora"], RunConfig())
    assert (plain.name, dict(plain.settings)) == ("la-lora", {})


def test_rows_differ_in_the_method_and_never_in_data_budget_or_who_takes_part() -> None:
    shared = set(fields_by_key(RunConfig)) - set(ROW_KEYS)
    assert {"task", "dataset", "partitioner", "train-limit", "model"} <= shared
    assert {"epsilon", "delta", "ledger-scope", "reproducible", "seed", "num-rounds"} <= shared
    assert {"num-clients", "fraction-train", "run-dir", "state-dir", "precision"} <= shared
    for key in sorted(shared):
        with pytest.raises(InvalidValue, match=f"--row = '{key}'"):
            read_methods([f"rolora {key}=1"], SHARED)


def test_a_rate_that_a_row_sets_is_kept_and_the_others_are_tuned() -> None:
    rows = ["la-lora", "la-lora lr-b=0.2", "rolora lr-a=1 lr-b=2 lr-head=3"]
    methods = read_methods(rows, SHARED)
    what = Comparison(SHARED, methods, (8.0,), seeds=1, trials=4)
    free, kept, fixed = (what.candidates(method.name) for method in methods)
    assert len(free) == len(kept) == 4
    assert {b for _, b, _ in kept} == {0.2}
    assert [(a, head) for a, _, head in kept] == [(a, head) for a, _, head in free]
    assert fixed == [(1.0, 2.0, 3.0)]
    jobs = what.tune_jobs()
    assert [job.row for job in jobs] == [
        m.name for m, n in zip(methods, (4, 4, 1), strict=True) for _ in range(n)
    ]
    assert len({job.key for job in jobs}) == 9


def test_a_pipe_in_a_name_does_not_break_the_table() -> None:
    from fedlora_flwr.studies.compare_tables import markdown

    table = markdown([[["method", "x"], ["as-lora, blocks a|b", "1"]]])
    assert "| as-lora, blocks a\\|b | 1 |" in table
