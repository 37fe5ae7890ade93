"""A run that stops getting better ends early; the best adapter is kept beside the last."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from fedlora_flwr.cli.run_screen import closing_rows
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.privacy.budget import Segment, epsilon_spent
from fedlora_flwr.server.best import Best
from fedlora_flwr.tasks.registry import build_task
from tests.hostile.tiny_task import READS
from tests.server.resuming import assert_same, begin, ledger, resume, rows, tiny

STILL = {"lr_a": 1e-12, "lr_b": 1e-12, "lr_head": 1e-12}
"""Nothing learns, so no evaluation is better than the first."""


def test_rounds_that_did_not_happen_are_not_spent(tmp_path: Path) -> None:
    config = tiny(tmp_path, num_rounds=9, eval_every=2, early_stopping_patience=2, **STILL)
    summary = begin(config, tmp_path / "run")
    assert (summary["status"], summary["rounds_done"]) == ("completed", 4)
    assert summary["end"] == "accuracy has not improved for 2 evaluations"
    spent = ledger(tmp_path / "run")
    assert [row[1] for row in spent] == [1, 2, 3, 4] * 3
    segment = Segment(spent[0][2], spent[0][3], sum(row[4] for row in spent[:4]))
    assert summary["epsilon_max"] == epsilon_spent([segment], config.delta).epsilon
    assert summary["epsilon_max"] < 0.8 * summary["epsilon_budget"] == 0.8 * config.epsilon
    shown = dict(closing_rows(summary))
    assert shown["Time"].endswith("for 4 of 9 rounds: accuracy has not improved for 2 evaluations")
    assert f"ε = {summary['epsilon_max']:.3f} of 8 at" in shown["Privacy"]
    # What has ended stays so, until there is more patience.
    assert resume(config, tmp_path / "run")["rounds_done"] == 4
    patient = replace(config, early_stopping_patience=3)
    assert resume(patient, tmp_path / "run")["rounds_done"] == 6
    begin(patient, tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_the_best_adapter_is_kept_beside_the_last_and_says_so(tmp_path: Path) -> None:
    config, run = tiny(tmp_path, num_rounds=4, lr_b=0.3, lr_head=0.3), tmp_path / "run"
    summary = begin(config, run)
    told = [row["accuracy"] for row in rows(run, "rounds")]
    best = told.index(max(told))
    assert 0 < best < 4
    assert summary["best"]["round"] == best
    task = build_task(config.task, config)
    for folder, value in (("best", max(told)), ("adapter", told[-1])):
        model = PeftModel.from_pretrained(task.build_model(), str(run / folder)).eval()
        assert task.evaluate(model, task.test_records())["accuracy"] == value
    assert dict(closing_rows(summary))["Best"] == (
        f"accuracy {max(told):.1%} after round {best}, kept in best/"
    )
    card = (run / "best" / "README.md").read_text()
    assert f"This is the model of round {best}, the best of all that were measured** by" in card
    assert f"before training and {max(told):.4f} after it" in card
    assert "this figure is optimistic" in card
    assert "optimistic" not in (run / "adapter" / "README.md").read_text()


def test_a_start_that_no_round_beats_is_told_as_such(tmp_path: Path) -> None:
    summary = begin(tiny(tmp_path, num_clients=1, min_clients=1, num_rounds=1), tmp_path / "run")
    none = {**summary, "best": {**summary["best"], "round": 0}}
    lines = closing_rows(none)
    expected = "no round was better than the start, by accuracy; best/ holds the start"
    assert dict(lines)["Best"] == expected
    assert "optimistic" not in " ".join(text for _, text in lines)
    assert "that of the only client (PRV accountant)" in dict(lines)["Privacy"]


@pytest.mark.parametrize(
    ("settings", "told", "kept", "ends"),
    [
        ({"early_stopping_patience": 2}, [1, 2, 2, 2], 1, 3),
        ({"early_stopping_patience": 2}, [3, 1, 2, 4], 0, 2),
        # Each step is small, and the best of them is kept; they end because they are too small.
        ({"early_stopping_patience": 2, "early_stopping_threshold": 2.0}, [1, 2, 3, 9], 2, 2),
        # Small steps add up.
        ({"early_stopping_patience": 3, "early_stopping_threshold": 1.5}, [1, 2, 3, 4, 5], 4, None),
        ({"early_stopping_patience": 1}, [float("nan"), 1, float("nan")], 1, 2),
        ({}, [1, 0, 0, 0, 0, 0], 0, None),
        ({"early_stopping_patience": 2, "metric_for_best_model": "loss"}, [3, 1, 2, 2], 1, 3),
        ({"metric_for_best_model": "perplexity"}, [9, 4, 5, 4], 1, None),
        ({"metric_for_best_model": "rouge_l"}, [0.1, 0.4, 0.3, 0.2], 1, None),
    ],
)
def test_patience_and_threshold(
    settings: dict[str, Any], told: list[float], kept: int, ends: int | None
) -> None:
    best, ended = Best(RunConfig(**settings), "accuracy"), None
    for number, value in enumerate(told):
        names = ("accuracy", "loss", "perplexity", "rouge_l")
        best.take(number, dict.fromkeys(names, value), {})
        if ended is None and best.stops:
            ended = number
            break
    assert (best.round, ended) == (kept, ends)


def test_a_metric_that_nobody_measures_is_told_before_any_client_is_asked(tmp_path: Path) -> None:
    READS.opened = 0
    with pytest.raises(InvalidValue, match=r"metric-for-best-model = 'acuracy'.*'accuracy'"):
        begin(tiny(tmp_path, metric_for_best_model="acuracy"), tmp_path / "run")
    assert ledger_is_missing(tmp_path / "run")


def ledger_is_missing(run: Path) -> bool:
    return not (run / "ledger.sqlite").exists()


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"strategy": "fedsa-lora", "early-stopping-patience": 3}, "early-stopping-patience = 3"),
        ({"share-head": False, "metric-for-best-model": "loss"}, "metric-for-best-model = 'loss'"),
        ({"early-stopping-threshold": 0.1}, "early-stopping-patience above 0"),
        ({"strategy": "fedsa-lora", "generation-limit": 5}, "generation-limit = 5"),
    ],
)
def test_figures_of_clients_end_no_run(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidValue, match=text):
        RunConfig.of(wrong)
