"""The paired game on real clients: it finds much of what is claimed, and what is broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedlora_flwr.audit.canaries import GRADIENT, SCALED
from fedlora_flwr.audit.record import VIOLATED
from fedlora_flwr.privacy import clipping, noise
from fedlora_flwr.secure_sum import grid
from tests.audit.attacks import attacked, without_noise

ONE_SUM: dict[str, Any] = {
    "num_clients": 2, "min_clients": 2, "num_rounds": 1,
}  # fmt: skip


@pytest.mark.parametrize("kind", [GRADIENT, SCALED])
def test_an_honest_client_holds_its_claim_and_the_attack_is_no_weak_one(kind: str) -> None:
    found = attacked(120, kind=kind, strategy="rolora", num_rounds=1)
    assert found.claim == pytest.approx(4.0, abs=0.05)
    assert found.counts.absent + found.counts.present == 4 * 120
    # Sixteen attacks found 1.6 of the 4.0, give or take .36. A blind one finds 0.
    assert 0.2 < found.best < found.claim, found


@pytest.mark.parametrize(
    "strategy", ["fedsa-lora", "ffa-seeds", "flora", "fedsvd", "as-lora", "la-lora"]
)
def test_each_family_can_be_attacked(strategy: str) -> None:
    """Their uploads differ: a shared factor, folded products, new bases, chosen factors."""
    assert attacked(20, strategy=strategy).verdict != VIOLATED


def test_the_opened_sum_of_a_secure_sum_holds_its_claim() -> None:
    found = attacked(100, "digits-secure-sum", **ONE_SUM)
    # One mechanism, so each run has one coin.
    assert found.counts.absent + found.counts.present == 100
    assert found.verdict != VIOLATED, found


def a_tenth_of_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = noise.SeededNoise.normal_like
    monkeypatch.setattr(noise.SeededNoise, "normal_like", lambda *a: drawn(*a) / 10)


def without_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        clipping, "clip_factors", lambda norms, _, kind: torch.ones_like(norms, dtype=kind)
    )


@pytest.mark.parametrize("fault", [without_noise, a_tenth_of_the_noise, without_clipping])
def test_what_is_broken_is_found(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    found = attacked(40, strategy="ffa-lora", num_rounds=1)
    assert found.verdict == VIOLATED, found


def test_a_sum_with_too_little_noise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = grid.Grid.noise
    monkeypatch.setattr(grid.Grid, "noise", lambda *a: drawn(*a) // 10)
    found = attacked(60, "digits-secure-sum", **ONE_SUM)
    assert found.verdict == VIOLATED, found
