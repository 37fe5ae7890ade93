"""The integer grid: exact sums, bounded norms, noise of the stated size, and no wrap."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.secure_sum.discrete_gaussian import seeded_words
from fedlora_flwr.secure_sum.grid import (
    MOST_SLACK,
    Grid,
    fitting_norm,
    opened,
    residues,
)
from fedlora_flwr.secure_sum.rounding import rounded
from tests.secure_sum.rounds import add_shares

FALSE_ALARM = 1e-6


@given(st.data(), st.integers(1, 8), st.integers(1, 20))
def test_the_opened_sum_is_the_sum_of_the_integers(
    data: st.DataObject, clients: int, size: int
) -> None:
    most = 2**31 // clients - 1
    numbers = st.lists(st.integers(-most, most), min_size=size, max_size=size)
    values = [np.array(data.draw(numbers), np.int64) for _ in range(clients)]

    total = add_shares([residues(v) for v in values])

    assert total.dtype == np.uint32
    assert opened(total).tolist() == np.sum(values, axis=0).tolist()


def test_uploads_stay_as_they_were() -> None:
    uploads = [residues(np.array([2**31 - 1])), residues(np.array([5]))]

    # One more than the range: the only way for an opened sum to be wrong.
    assert opened(add_shares(uploads)).tolist() == [5 - 1 - 2**31]
    assert [int(upload[0]) for upload in uploads] == [2**31 - 1, 5]


@settings(deadline=None)
@given(
    st.integers(1, 300),
    st.floats(1e-6, 1e6),
    st.floats(1e-12, 1e12),
    st.sampled_from([1024, 2**15, 2**20]),
    st.integers(0, 2**31),
)
def test_no_rounded_record_is_longer_than_the_grid_norm(
    size: int, clip_norm: float, length: float, norm: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4, size, generator=generator) ** 3 * length
    rows[1] = length  # Every coordinate is rounded in the same direction.
    rows[2, 0] = float("nan")

    found = rounded(rows.clone(), clip_norm, norm)

    squares = [sum(int(x) ** 2 for x in row) for row in found.tolist()]
    assert max(squares) <= norm**2
    assert squares[2] == 0
    assert torch.equal(found, found.round())


def test_rounding_moves_a_clipped_gradient_by_half_a_unit() -> None:
    rows = torch.tensor([[0.3, -0.2, 0.1], [30.0, -20.0, 10.0]])

    found = rounded(rows.clone(), 2.0, 2**16)

    room = 2**16 - 3**0.5 / 2 - 1
    longest = rows[1].double() / rows[1].double().norm() * room
    assert (found[0] - rows[0] / 2 * 2**16).abs().max() <= 0.51
    assert (found[1] - longest).abs().max() <= 0.51


def test_a_record_that_does_not_fit_counts_as_zero() -> None:
    # √D/2 is above the norm, so nothing could be promised.
    assert not rounded(torch.ones(1, 400), 1.0, 10).any()


@pytest.mark.parametrize("sigma", [0.5, 1.0, 7.3])
@pytest.mark.parametrize("shares", [1, 8, 100])
def test_the_sum_has_at_least_the_noise_that_is_asked_for(sigma: float, shares: int) -> None:
    grid = Grid.of(sigma, shares, 2**16)

    assert sigma <= grid.noise_multiplier <= 1.001 * sigma
    assert grid.single_noise_multiplier == pytest.approx(sigma / shares**0.5, rel=1e-3)
    assert grid.slack(10**7, 10**6) <= MOST_SLACK
    grid.check_slack(10**7, 10**6)


def test_the_opened_noise_has_its_variance() -> None:
    grid, size = Grid.of(1.7, 6, 2**14), 100_000
    words = seeded_words(8)
    zero = np.zeros(size, np.int64)

    total = opened(add_shares([residues(zero + grid.noise(size, words)) for _ in range(6)]))

    units = total / (grid.norm * grid.noise_multiplier)
    assert units.var() == pytest.approx(1, rel=0.01)  # Four deviations of √(2/n).
    assert stats.kstest(units, "norm").pvalue > FALSE_ALARM


def test_an_independent_central_step_has_the_same_distribution() -> None:
    """DP-SGD on the union: clip, add up, add one Gaussian; no grid, no shares, no residues."""
    rng = np.random.default_rng(9)
    gradients = rng.normal(size=(30, 4)) * rng.uniform(0.1, 3, size=(30, 1))
    clip, sigma, draws = 1.5, 0.8, 20_000
    lengths = np.linalg.norm(gradients, axis=1, keepdims=True)
    clipped = gradients * np.minimum(1, clip / lengths)
    central = clipped.sum(axis=0) + rng.normal(size=(draws, 4)) * sigma * clip

    grid, words = Grid.of(sigma, 3, 2**16), seeded_words(10)
    rows = rounded(torch.tensor(gradients), clip, grid.norm).to(torch.int64).numpy()
    uploads = [
        residues(part.sum(axis=0) + grid.noise(4 * draws, words).reshape(draws, 4))
        for part in np.split(rows, [5, 5])  # The second client's sample is empty.
    ]
    shared = opened(add_shares(uploads)) * clip / grid.norm

    for one, other in zip(central.T, shared.T, strict=True):
        assert stats.ks_2samp(one, other).pvalue > FALSE_ALARM
    assert np.cov(shared.T) == pytest.approx(np.cov(central.T), abs=0.06)


@pytest.mark.parametrize(
    ("sigma", "shares", "clients", "batch", "size"),
    [(3.0, 8, 10, 201, 2_000), (0.9, 25, 30, 4096, 20_000), (0.5, 3, 3, 30_000, 3_000)],
)
def test_a_sum_of_records_that_all_agree_does_not_wrap(
    sigma: float, shares: int, clients: int, batch: float, size: int
) -> None:
    norm = fitting_norm(sigma, shares, clients, batch, size)
    grid, words = Grid.of(sigma, shares, norm), seeded_words(11)
    # The worst case: each record has its whole norm in one and the same coordinate.
    joined = int(np.random.default_rng(11).poisson(batch))

    noise = sum(grid.noise(size, words) for _ in range(clients))

    largest = joined * norm + np.abs(noise).max()
    # Not by far: a finer grid would be another power of two.
    assert largest < 2**31
    assert 4 * largest > 2**31 or norm == 2**20


def test_what_does_not_fit_into_32_bits_is_refused() -> None:
    with pytest.raises(InvalidValue, match="expected records per round = 10000000"):
        fitting_norm(1.0, 8, 10, 1e7, 1000)
    with pytest.raises(InvalidValue, match="noise deviation"):
        Grid.of(1e5, 1, 2**20)


def test_a_grid_that_is_too_coarse_for_its_run_is_refused() -> None:
    with pytest.raises(InvalidValue, match="finer grid"):
        Grid(1024, 2, 10).check_slack(10_000, 100)
    with pytest.raises(InvalidValue, match="noise deviation"):
        Grid(1024, 1, 6)
    with pytest.raises(InvalidValue, match="shares"):
        Grid(1024, 1, 0)
