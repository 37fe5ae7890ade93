"""The slack against sums and integrals worked out number by number."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from fedlora_flwr.secure_sum import slack
from fedlora_flwr.secure_sum.slack import ROUNDING, log_ratio, widened


def discrete(variance: float, reach: int) -> NDArray[np.float64]:
    x = np.arange(-reach, reach + 1)
    found = np.exp(-(x**2) / (2 * variance))
    normalized: NDArray[np.float64] = found / found.sum()
    return normalized


@pytest.mark.parametrize("shares", [2, 3, 8])
def test_a_sum_of_shares_is_within_the_bound_of_one_discrete_gaussian(shares: int) -> None:
    one = total = discrete(1.0, 40)
    for _ in range(shares - 1):
        total = np.convolve(total, one)
    reach = (len(total) - 1) // 2
    middle = slice(reach - 15, reach + 16)  # Beyond, the convolution's own rounding shows.

    ratio = np.abs(np.log(total[middle] / discrete(shares, reach)[middle]))

    bound = sum(-3 * math.log1p(-slack._eta(k / (k + 1))) for k in range(1, shares))
    assert 1e-7 < ratio.max() <= bound


def test_one_share_needs_no_sum() -> None:
    assert log_ratio(100, 1) == pytest.approx(-2 * math.log1p(-slack._eta(ROUNDING)))


def test_a_discrete_gaussian_is_a_rounded_continuous_one() -> None:
    variance, small = 0.5, 0.2  # As `ROUNDING`, but coarse enough to be seen.
    x = np.linspace(-8, 8, 16_001)
    density = np.exp(-(x**2) / (2 * (variance - small)))
    density /= density.sum()
    near = np.exp(-((np.arange(-20, 21)[:, None] - x) ** 2) / (2 * small))
    rounded = (near / near.sum(axis=0) * density).sum(axis=1)

    ratio = np.abs(np.log(rounded / discrete(variance, 20)))[17:24]

    assert 1e-6 < ratio.max() <= -2 * math.log1p(-slack._eta(small))


def test_the_bound_counts_all_shares_without_adding_them_one_by_one() -> None:
    few, many = log_ratio(2, 1001), log_ratio(2, 1_000_000)

    assert few < many < 1000 * few
    assert math.isinf(log_ratio(2, 1))  # 4 is not above ROUNDING.


def test_epsilon_and_delta_are_widened() -> None:
    assert widened(1.0, 1e-5, 0.1) == pytest.approx((1.2, 1e-5 * math.exp(0.1)))
    assert widened(1.0, 1e-5, 0.0) == (1.0, 1e-5)
