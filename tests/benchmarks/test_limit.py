"""The limit of a step: its matrix products are counted right, and only those that it needs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.figures import Figure
from benchmarks.limit import NAMES, Product, flops, limit, measure, products
from benchmarks.step import PHASES, StepBench, plain_step, roberta

TINY = roberta(
    "tiny RoBERTa", hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64,
)  # fmt: skip
# Dropout keeps torch from fused attention, whose products it does not count.


@pytest.mark.parametrize("phase", PHASES)
def test_the_products_of_a_step_have_the_operations_that_torch_counts(phase: str) -> None:
    bench = StepBench(TINY, TINY.targets["q,v"], 4, torch.device("cpu"))
    step = plain_step(bench.plain, phase, TINY, bench.batch)
    with FlopCounterMode(display=False) as counter:
        step()
    assert flops(products(step)) == counter.get_total_flops() > 0


def test_products_are_told_apart_by_size_and_layout() -> None:
    x, y = torch.randn(5, 3), torch.randn(3, 7)
    found = products(
        lambda: (x @ y, x @ y, y.t() @ x.t(), torch.randn(2, 5, 3) @ torch.randn(3, 1))
    )
    assert found == Counter(
        {Product(1, 5, 3, 7): 2, Product(1, 7, 3, 5, True, True): 1, Product(1, 10, 3, 1): 1}
    )
    assert flops(found) == 2 * (2 * 5 * 3 * 7 + 7 * 3 * 5 + 10 * 3)
    for dtype in NAMES:
        assert limit(found, dtype, repetitions=1) > 0


def test_each_step_is_compared_with_its_limit_in_both_precisions_and_on_all_threads() -> None:
    figures: list[Figure] = []
    before = torch.get_num_threads()
    try:
        measure([TINY], 2, 1, figures.append, threads=[1, 2])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    steps = [figure for figure in figures if figure.against == "its products"]
    assert len(steps) == 2 * len(TINY.targets) * len(PHASES) * len(NAMES)
    for on in ("one thread", "2 threads"):
        assert sum(f", {on}, " in figure.what for figure in steps) == len(steps) / 2
    for figure in steps:
        assert figure.ratio is not None
        assert figure.met is not None
        assert "the step makes 1.0" in figure.note  # Nothing is multiplied in vain.
    shares = [f.ratio or 0.0 for f in figures if ", AB, fp32: share of" in f.what]
    assert sum(shares) == pytest.approx(2 * len(TINY.targets))
