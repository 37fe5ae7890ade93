"""Nothing but `Released` leaves a client."""

from __future__ import annotations

import math
import sqlite3
from contextlib import closing
from typing import Any

import pytest
from flwr.app import RecordDict

from fedlora_flwr.clients.trainer import process_trainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.state import state_folder
from fedlora_flwr.layout import factor_of
from fedlora_flwr.privacy.budget import Segment, calibrate, epsilon_spent
from fedlora_flwr.strategies import RoLoRA
from fedlora_flwr.strategies.replies import to_record
from tests.clients.asking import Asker
from tests.conftest import MakeConfig

METRICS = {
    "epsilon",
    "epsilon-budget",
    "delta",
    "steps",
    "seconds",
    "peak-memory-mb",
    "weight",
    "num-examples",
}
TEXTS = {"status", "accountant", "client"}


def split(content: RecordDict) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return arrays, metrics and texts of a reply that has nothing else."""
    assert set(content) == {"arrays", "metrics", "config"}
    arrays = {name: array.numpy() for name, array in content.array_records["arrays"].items()}
    metrics, texts = content.metric_records["metrics"], content.config_records["config"]
    return arrays, dict(metrics), dict(texts)


def count_rows(config: RunConfig) -> int:
    with closing(sqlite3.connect(state_folder(config) / "ledger.sqlite")) as db:
        return int(db.execute("SELECT COUNT(*) FROM releases").fetchone()[0])


def test_a_reply_holds_what_is_documented_and_nothing_else(make_config: MakeConfig) -> None:
    asker = Asker(make_config())
    arrays, metrics, texts = split(asker.train("B"))
    assert set(metrics) == METRICS
    assert set(texts) == TEXTS
    assert set(arrays) == {name for name in asker.start if factor_of(name) in ("B", None)}
    assert {array.dtype.name for array in arrays.values()} == {"float32"}
    assert {name: array.shape for name, array in arrays.items()} == {
        name: asker.start[name].shape for name in arrays
    }


def test_what_a_reply_says(make_config: MakeConfig) -> None:
    asker = Asker(make_config())
    asker.train("B", 1)
    _, metrics, texts = split(asker.train("A", 2))
    config = asker.config
    n = len(process_trainer(config).task.client_records(0, config.num_clients))
    q = config.batch_size / n
    sigma = calibrate(config.epsilon, config.delta, q, config.planned_steps)
    spent = epsilon_spent([Segment(sigma, q, 4)], config.delta)
    assert metrics["epsilon"] == spent.epsilon
    assert metrics["epsilon"] <= config.epsilon
    assert (metrics["epsilon-budget"], metrics["delta"]) == (config.epsilon, config.delta)
    assert metrics["steps"] == 4
    assert metrics["seconds"] > 0
    assert metrics["peak-memory-mb"] > 10
    assert texts == {"status": "ok", "accountant": spent.accountant, "client": "partition-000000"}


def test_under_uniform_weighting_no_size_leaves(make_config: MakeConfig) -> None:
    _, metrics, _ = split(Asker(make_config()).train(weighting="uniform"))
    assert (metrics["num-examples"], metrics["weight"]) == (1, 1.0)


@pytest.mark.parametrize("weighting", ["size", "inverse-noise"])
def test_weights_are_the_public_quantities_that_they_are_named_for(
    make_config: MakeConfig, weighting: str
) -> None:
    asker = Asker(make_config(clip_norm=0.5, weighting=weighting))
    _, metrics, _ = split(asker.train(weighting=weighting))
    config = asker.config
    n = len(process_trainer(config).task.client_records(0, config.num_clients))
    sigma = calibrate(config.epsilon, config.delta, 16 / n, config.planned_steps)
    expected = {"size": n, "inverse-noise": (16 / (sigma * 0.5)) ** 2}
    assert metrics["weight"] == pytest.approx(expected[weighting])
    assert metrics["num-examples"] == (n if weighting == "size" else 1)
    assert set(metrics) == METRICS


def test_unprotected_metrics_are_called_so(make_config: MakeConfig) -> None:
    _, metrics, texts = split(Asker(make_config(report_unprotected_metrics=True)).train())
    extra = set(metrics) - METRICS
    assert extra == {"unprotected-loss", "unprotected-accuracy"}
    assert set(texts) == TEXTS


def test_evaluation_on_private_records_is_refused(make_config: MakeConfig) -> None:
    reason = Asker(make_config()).error("evaluate", server_round=1)
    assert "report-unprotected-metrics" in reason


def test_evaluation_where_the_run_allows_it(make_config: MakeConfig) -> None:
    asker = Asker(make_config(report_unprotected_metrics=True))
    reply = asker.message("evaluate", server_round=1)
    assert not reply.has_error()
    metrics = dict(reply.content.metric_records["metrics"])
    assert set(metrics) == {"loss", "accuracy", "num-examples"}
    assert metrics["num-examples"] == 1
    assert not reply.content.array_records


def test_an_exhausted_client_declines_with_no_arrays(make_config: MakeConfig) -> None:
    asker = Asker(make_config(max_rounds=1))
    _, first, _ = split(asker.train(server_round=1))
    arrays, metrics, texts = split(asker.train(server_round=2))
    assert not arrays
    assert texts["status"] == "budget-exhausted"
    assert metrics["num-examples"] == 0
    assert (metrics["epsilon"], metrics["steps"]) == (first["epsilon"], first["steps"])
    assert set(metrics) == METRICS
    assert set(texts) == TEXTS
    assert count_rows(asker.config) == 1


def test_a_round_in_which_every_budget_is_spent_changes_nothing(make_config: MakeConfig) -> None:
    config = make_config(max_rounds=1, num_rounds=2)
    asker, strategy = Asker(config), RoLoRA()
    with asker.grid.running() as grid:
        result = strategy.start(grid, to_record(asker.start), num_rounds=2)
    assert count_rows(config) == config.num_clients
    assert list(result.train_metrics_clientapp) == [1]
    assert strategy.last_round is not None
    assert len(strategy.last_round.declined) == config.num_clients
    assert strategy.finished


def test_a_refused_round_costs_nothing(make_config: MakeConfig) -> None:
    asker = Asker(make_config())
    asker.error(plan="B", server_round=1, fingerprint="another")
    assert count_rows(asker.config) == 0


def test_a_run_without_privacy_says_so(make_config: MakeConfig) -> None:
    _, metrics, texts = split(Asker(make_config(epsilon=math.inf)).train())
    assert metrics["epsilon"] == math.inf
    assert texts["accountant"] == "none"
