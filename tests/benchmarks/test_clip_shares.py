"""A clip norm for each part leaves no record longer than the joint clip at the same noise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.clip_shares import Parts, apart, joint, matched, signals


def drawn(seed: int, count: int = 20) -> Parts:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randn(2, count, 1, generator=generator, dtype=torch.float64).mul(2).exp()
    rows = torch.randn(2, count, 5, generator=generator, dtype=torch.float64)
    return Parts(lengths[0] * rows[0], lengths[1] * rows[1])


@given(
    st.integers(0, 10_000), st.floats(0.01, 0.99), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)
)  # fmt: skip
def test_no_record_is_longer_if_each_part_is_clipped_alone(
    seed: int, share: float, weight: float, clip_norm: float
) -> None:
    parts = drawn(seed)
    lengths = [
        (one.square() + two.square()).sqrt()
        for one, two in (
            apart(parts, share, weight, clip_norm).lengths,
            joint(parts, weight, clip_norm).lengths,
        )
    ]
    assert bool((lengths[0] <= lengths[1] * (1 + 1e-12)).all())
    assert bool((lengths[1] <= clip_norm * (1 + 1e-12)).all())


def test_the_weight_is_found_that_gives_the_head_its_signal() -> None:
    parts = drawn(1)
    _, head = signals(apart(parts, 0.7, 1.0, 0.5), 0.5)
    weight = matched(parts, head, 0.5)
    assert signals(joint(parts, weight, 0.5), 0.5)[1] == pytest.approx(head, rel=1e-6)
