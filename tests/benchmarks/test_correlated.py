from __future__ import annotations

import numpy as np
import pytest

from benchmarks.correlated import Setting, accumulated_noise, banded_root, choices
from fedlora_flwr.privacy.budget import calibrate

TASK = Setting("small", 24, 0.05, 1e-3)


def test_one_band_is_independent_noise() -> None:
    sigma = calibrate(2.0, TASK.delta, TASK.sample_rate, TASK.rounds)

    found = accumulated_noise(TASK, 2.0, 1)

    # After t rounds the sum has the variance tσ²; its mean over 24 rounds is 12.5 σ².
    assert found == pytest.approx(sigma * 12.5**0.5)


def test_bands_take_noise_back() -> None:
    sigma = calibrate(2.0, TASK.delta, 4 * TASK.sample_rate, 6)
    matrix = banded_root(24, 4)
    noise = np.tril(np.ones((24, 24))) @ np.linalg.inv(matrix)

    assert accumulated_noise(TASK, 2.0, 4) == pytest.approx(
        sigma * np.sqrt((noise**2).sum(1).mean())
    )
    assert np.linalg.norm(matrix, axis=0).max() == pytest.approx(1)
    assert (np.tril(matrix, -4) == 0).all()
    assert choices(TASK) == [1, 2, 3, 4, 5, 6]
