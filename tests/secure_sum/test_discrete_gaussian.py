"""The sampler against the distribution's own formula."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.secure_sum import discrete_gaussian as module
from fedlora_flwr.secure_sum.discrete_gaussian import (
    LARGEST_DEVIATION,
    discrete_gaussian,
    seeded_words,
)

FALSE_ALARM = 1e-6
"""With fixed seeds a test passes or fails for good; for new seeds, once in a million."""


def weights(deviation: int, reach: int) -> NDArray[np.float64]:
    x = np.arange(-reach, reach + 1)
    found = np.exp(-(x**2) / (2 * deviation**2))
    normalized: NDArray[np.float64] = found / found.sum()
    return normalized


@pytest.mark.parametrize("deviation", [1, 2, 7, 40])
def test_samples_have_the_probabilities_of_the_formula(deviation: int) -> None:
    count, reach = 200_000, 12 * deviation

    drawn = discrete_gaussian(deviation, count, seeded_words(deviation))

    expected = count * weights(deviation, reach)
    seen = np.bincount(drawn + reach, minlength=2 * reach + 1)
    common = expected >= 10  # The rule for a chi-square statistic; what is rarer is one class.
    seen = np.append(seen[common], seen[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    assert stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue > FALSE_ALARM


@pytest.mark.parametrize("deviation", [1000, LARGEST_DEVIATION])
def test_a_fine_grid_is_a_gaussian(deviation: int) -> None:
    drawn = discrete_gaussian(deviation, 100_000, seeded_words(3)) / deviation

    assert stats.kstest(drawn, "norm").pvalue > FALSE_ALARM


def test_the_variance_is_the_square_of_the_deviation() -> None:
    drawn = discrete_gaussian(5, 400_000, seeded_words(4)).astype(float)

    # The deviation of a sample variance is √(2/n) of it: six of them are 1.3 %.
    assert drawn.var() == pytest.approx(25, rel=6 * np.sqrt(2 / len(drawn)))
    assert drawn.mean() == pytest.approx(0, abs=6 * 5 / np.sqrt(len(drawn)))


def test_bernoulli_draws_have_exponential_probabilities() -> None:
    for numerator in (0, 1, 3, 7, 25):
        numerators = np.full(100_000, numerator, np.uint64)
        hits = module._decays(numerators, 7, seeded_words(numerator)).sum()
        chance = float(np.exp(-numerator / 7))
        assert stats.binomtest(int(hits), 100_000, chance).pvalue > FALSE_ALARM


def test_a_limit_that_divides_no_power_of_two_is_uniform_too() -> None:
    # Words at the very end of the range must be drawn again, or small numbers come too often.
    last = np.full(4, 2**64 - 1, np.uint64)
    supply = [last, np.arange(4, dtype=np.uint64)]

    assert module._below(3, 4, lambda count: supply.pop(0)).tolist() == [0, 1, 2, 0]


def test_noise_comes_from_the_operating_system_unless_a_seed_is_given() -> None:
    assert not np.array_equal(discrete_gaussian(1000, 100), discrete_gaussian(1000, 100))
    one, other = (discrete_gaussian(1000, 100, seeded_words(5)) for _ in range(2))
    assert np.array_equal(one, other)


@pytest.mark.parametrize("deviation", [0, -1, LARGEST_DEVIATION + 1])
def test_deviations_that_do_not_fit_are_refused(deviation: int) -> None:
    with pytest.raises(InvalidValue, match="deviation"):
        discrete_gaussian(deviation, 1)


def test_no_sample_is_asked_for() -> None:
    assert discrete_gaussian(3, 0).shape == (0,)
