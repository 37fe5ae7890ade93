"""What an attacker measures: the server's view of a sum, and one upload under its masks.

The attacker knows every record but one, and decides by the opened sum whether that record was
there. Its record is the worst one: a gradient of norm C that all others leave room for.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedlora_flwr.audit.bounds import clopper_pearson, epsilon_of_mu
from fedlora_flwr.secure_sum.grid import Grid, opened, residues
from fedlora_flwr.secure_sum.rounding import rounded
from fedlora_flwr.secure_sum.terms import Terms
from tests.secure_sum.rounds import Round, add_shares

TRIALS, CLIENTS, SIGMA, DELTA = 20_000, 5, 0.8, 1e-3
GRID = Grid.of(SIGMA, 3, 4096)  # Of five clients, one may be gone and one may collude.


def views(there: bool, shares: int) -> NDArray[np.float64]:
    """Return what the server reads of each opened sum: its part along the record's gradient."""
    row = rounded(torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64), 1.0, GRID.norm)
    record = row.numpy().astype(np.int64)[0] * there
    noise = GRID.noise(TRIALS * shares * 4).reshape(TRIALS, shares, 4)
    noise[:, 0] += record
    return np.array([opened(add_shares(residues(part) for part in sums))[0] for sums in noise])


def epsilon_at_least(absent: NDArray[np.float64], there: NDArray[np.float64]) -> float:
    return clopper_pearson(absent, there, DELTA, 0.99).epsilon


def claimed(sigma: float) -> float:
    return epsilon_of_mu(1 / sigma, DELTA)


@pytest.mark.parametrize("shares", [3, 5])
def test_the_servers_view_tells_no_more_than_is_claimed(shares: int) -> None:
    """With as few shares as may be opened, and with all of them."""
    found = epsilon_at_least(views(False, shares), views(True, shares))

    # Not so far below that it would say nothing.
    assert 0.25 * claimed(SIGMA) < found < claimed(SIGMA)


def test_the_audit_finds_a_sum_that_has_too_little_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.GRID", Grid(GRID.norm, GRID.deviation // 3, 3))
    found = epsilon_at_least(views(False, 3), views(True, 3))

    assert found > claimed(SIGMA)


def test_one_masked_upload_tells_nothing() -> None:
    """The record is far above the noise here, and the server holds all that one client sends."""
    terms = Terms(1, "B", CLIENTS, 1, 1, SIGMA, GRID.norm, 1.0, 1.0)
    sent: dict[bool, list[int]] = {False: [], True: []}
    for trial in range(60):
        there = trial % 2 == 1
        this = Round(terms, CLIENTS)
        opening, client = this.share(), this.shared[0]
        upload = {"a": np.array([there * GRID.norm] * 64, np.uint32)}
        masked = client.masked(upload, client.open_shares(terms, opening.sealed_for(0)))["a"]
        sent[there] += masked.tolist()

    # Both are uniform, so their ranks agree up to chance (Mann and Whitney's statistic).
    absent, present = np.array(sent[False], float), np.array(sent[True], float)
    above = float((np.searchsorted(np.sort(absent), present) / len(absent)).mean())
    deviation = math.sqrt((1 / len(absent) + 1 / len(present)) / 12)
    assert abs(above - 0.5) < 5 * deviation
