"""What `benchmarks.mechanisms` measures, against sums that are worked out in another way."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from benchmarks import mechanism_costs, mechanism_coupling, mechanism_noise, mechanism_regression
from benchmarks.mechanism_page import PAGE, RESULTS, TABLES, difference, read, sections, written
from benchmarks.mechanisms import PARTS, main
from fedlora_flwr.layout import Layout
from fedlora_flwr.strategies import strategy_class

ROWS = read(RESULTS)


def test_the_page_has_the_tables_of_the_committed_rows() -> None:
    assert PARTS.keys() == TABLES.keys() == ROWS.keys()
    page = PAGE.read_text(encoding="utf-8")
    assert written(page, sections(ROWS)) == page


def test_formula_and_sampling_agree_in_every_committed_row() -> None:
    rows = ROWS["noise"]
    far = (rows["sampled"] - rows["formula"]) / rows["error"]
    assert len(rows) == 2 * 2 * len(mechanism_noise.METHODS)
    assert far.abs().max() < 4
    assert (rows["error"] / rows["formula"]).max() < 0.05


def test_the_noise_of_the_real_step_is_that_of_the_formula() -> None:
    rows = pd.DataFrame(mechanism_noise.measure(mechanism_noise.Size(20)))
    far = (rows["sampled"] - rows["formula"]) / rows["error"]
    assert far.abs().max() < 5
    assert (rows["error"] / rows["formula"]).max() < 0.3


def test_two_rounds_of_turns_add_the_same_noise_by_step_and_by_round() -> None:
    """And a quarter of DP-LoRA's product of noises: each factor has half the variance."""
    rows = ROWS["noise"]
    two = rows[(rows["rounds"] == 2) & (rows["start"] == "B = 0")].set_index("method")["formula"]
    assert two["la-lora"] == two["rolora"] == two["as-lora"]
    single = two["ffa-lora"]  # B's noise alone, of twice as many steps.
    crossed = two["rolora"] - single / 2
    assert two["dp-lora"] - single == pytest.approx(4 * crossed, rel=1e-4)


def test_what_the_binomial_filter_keeps_of_white_noise() -> None:
    assert mechanism_noise.kept(9, "none") == 9
    wide = mechanism_noise.kept(1000, "binomial") - mechanism_noise.kept(900, "binomial")
    assert wide / 100 == pytest.approx(70 / 256)  # (1 + 16 + 36 + 16 + 1) / 16²


def test_small_joint_steps_are_coupled_by_the_mixed_part_of_the_hessian() -> None:
    start, later = mechanism_coupling.measure(mechanism_coupling.QUICK)
    # While B = 0, A has no gradient and does not move.
    assert start["coupling"] == start["second_order"] == start["product"] == 0
    assert later["coupling"] == pytest.approx(later["second_order"], rel=0.3)
    assert later["coupling"] > 1e-4
    assert later["single"] < 0


def test_a_frozen_a_stalls_where_its_rows_end() -> None:
    """The rest is what the target reads outside of the rows of A: ``W (I - A⁺ A)``."""
    problem = mechanism_regression._Problem(3)
    lost = whole = 0.0
    for target, (_, a) in zip(problem._targets, problem._pairs, strict=True):
        spans = np.linalg.pinv(problem.arrays[a]) @ problem.arrays[a]
        lost += np.square(target - target @ spans).sum()
        whole += np.square(target).sum()
    method = strategy_class("ffa-lora")(seed=1, local_steps=5)
    *_, (number, error, averaged) = problem.play(method, 60, 0.0)
    assert (number, averaged) == (60, 0.0)
    assert error == pytest.approx(math.sqrt(lost / whole), rel=1e-3)


def test_schedules_lose_by_averaging_only_where_both_factors_train_in_a_round() -> None:
    rows = pd.DataFrame(mechanism_regression.measure(mechanism_regression.QUICK))
    lost = rows.groupby("schedule")["mean_error"].max()
    assert set(lost[lost > 0].index) == {"dp-lora", "la-lora"}
    assert set(rows["round"]) == {5}


def test_uploads_are_the_arrays_that_train() -> None:
    rows = pd.DataFrame(mechanism_costs.measure_rounds(mechanism_costs.QUICK)).set_index("method")
    sent, peak = rows["upload_kb"], rows["peak_mb"]
    assert sent["dp-lora"] == sent["la-lora"] > sent["ffa-lora"]
    # A and B take turns by round, or by block, so two rounds send each once and the head twice.
    assert sent["rolora"] == sent["as-lora"]
    assert (peak <= peak["dp-lora"]).all()
    assert peak["ffa-lora"] < peak["dp-lora"]


def test_half_and_half_plans_train_all_in_two_rounds() -> None:
    names = [f"blocks.{i}.fc.lora_{factor}.weight" for i in range(3) for factor in "AB"]
    layout = Layout.of(names)
    plans = list(mechanism_costs._plans("as-lora", layout))
    assert [str(plan) for plan in plans] == ["BAB", "ABA"]
    assert {n for plan in plans for n in layout.trained(plan, 1)} == set(names)


def test_a_difference_is_taken_by_seed() -> None:
    rows = pd.DataFrame(
        {"row": ["x", "x", "y", "y"], "seed": [1, 2, 1, 2], "accuracy": [0.5, 0.7, 0.4, 0.7]}
    )
    assert difference(rows, "x", "y") == "+5.0 ± 5.0"


def test_an_unknown_part_is_refused_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["noise", "flatness"])
    said = capsys.readouterr().err
    assert "no part is called 'flatness'. Choose from noise, coupling" in said
