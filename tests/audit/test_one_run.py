"""One run with many canaries: the attack tells them apart, and finds a run without noise."""

from __future__ import annotations

import numpy as np
import pytest

from fedlora_flwr.audit.attacker import Evidence
from fedlora_flwr.audit.one_run import correct
from fedlora_flwr.audit.record import VIOLATED
from tests.audit.attacks import attacked_once, without_noise


def test_hundreds_of_canaries_in_one_run_hold_the_claim() -> None:
    found = attacked_once(80, strategy="rolora", num_clients=10)
    assert found.counts.absent + found.counts.present == 800
    assert found.counts.runs == 1
    # Ten attacks found .76 of the 4.0, give or take .13. A blind one finds 0.
    assert 0.2 < found.best < found.claim, found


def test_a_run_without_noise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    without_noise(monkeypatch)
    found = attacked_once(50, confidence=0.995, strategy="ffa-lora", epsilon=1.0)
    assert found.verdict == VIOLATED


def test_only_the_highest_and_the_lowest_scores_are_guessed() -> None:
    scores, truth = np.arange(8.0), np.array([0, 1, 0, 0, 1, 1, 0, 1], bool)
    assert [correct(scores, truth, guesses) for guesses in (2, 4, 8)] == [2, 2, 6]


def test_the_scores_take_away_what_other_canaries_add() -> None:
    """Two canaries of nearly the same gradient: only their difference tells which one is there."""
    gradients = np.array([[1.0, 0.0], [0.96, 0.28]])
    seen, variance = gradients[1], 1e-4
    evidence = Evidence(gradients @ seen / variance, gradients @ gradients.T / variance)
    first, second = evidence.scores
    assert first < -0.4 < 0.4 < second
    halves = [Evidence(evidence.towards / 2, evidence.overlap / 2)] * 2
    assert (halves[0] + halves[1]).scores == pytest.approx(evidence.scores)
