from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats  # type: ignore[import-untyped]

from fedlora_flwr.privacy.noise import NoiseSource, SecureNoise, SeededNoise

COUNT = 200_000
SHAPE = torch.zeros(400, 500)

every_source = pytest.mark.parametrize(
    "source", [SecureNoise(), SeededNoise(4)], ids=["os", "seed"]
)


@every_source
def test_noise_is_standard_normal(source: NoiseSource) -> None:
    noise = source.normal_like(SHAPE.double()).numpy().ravel()

    # Five standard errors: one false alarm in a million runs.
    assert abs(noise.mean()) < 5 / COUNT**0.5
    assert abs(noise.std() - 1) < 5 / (2 * COUNT) ** 0.5
    assert abs(stats.kurtosis(noise)) < 5 * (24 / COUNT) ** 0.5
    assert stats.kstest(noise, "norm").pvalue > 1e-6


@every_source
def test_coordinates_are_independent(source: NoiseSource) -> None:
    noise = source.normal_like(SHAPE.double()).numpy()
    assert len(np.unique(noise)) == COUNT
    # Halves and quarters too: Box-Muller makes values in pairs that far apart.
    flat = noise.ravel()
    for lag in (1, 500, COUNT // 4, COUNT // 2, 3 * COUNT // 4):
        for values in (flat, flat**2):
            rest = COUNT - lag
            assert abs(np.corrcoef(values[:rest], values[lag:])[0, 1]) < 5 / rest**0.5


@every_source
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3, 5), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_noise_has_the_form_of_its_reference(
    source: NoiseSource, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    reference = torch.full(shape, 7.0, dtype=dtype)
    noise = source.normal_like(reference)

    assert (noise.shape, noise.dtype, noise.device) == (reference.shape, dtype, reference.device)
    assert bool((reference == 7).all())


def test_secure_noise_differs_at_each_draw_and_ignores_every_seed() -> None:
    def draw() -> torch.Tensor:
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - the global generator is what must not matter
        return SecureNoise().normal_like(SHAPE)

    assert not torch.isclose(draw(), draw(), rtol=1e-6).float().mean() > 0.001


def test_secure_noise_is_finite_for_the_extreme_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    for byte in (b"\x00", b"\xff"):
        monkeypatch.setattr("os.urandom", lambda count, byte=byte: byte * count)
        assert SecureNoise().normal_like(torch.zeros(5)).isfinite().all()


def test_seeded_noise_repeats_and_goes_on() -> None:
    first, again = SeededNoise(3), SeededNoise(3)
    draws = [first.normal_like(SHAPE) for _ in range(2)]

    assert torch.equal(draws[0], again.normal_like(SHAPE))
    assert torch.equal(draws[1], again.normal_like(SHAPE))
    assert not torch.equal(draws[0], draws[1])


@pytest.mark.parametrize("other", [4, 3 + 2**32, 3 + 2**62])
def test_seeded_noise_follows_all_bits_of_its_seed(other: int) -> None:
    assert not torch.equal(SeededNoise(3).normal_like(SHAPE), SeededNoise(other).normal_like(SHAPE))


def test_seeded_noise_leaves_the_global_generators_alone() -> None:
    torch_before, numpy_before = torch.get_rng_state(), _numpy_state()
    SeededNoise(3).normal_like(SHAPE)

    assert torch.equal(torch.get_rng_state(), torch_before)
    assert _numpy_state() == numpy_before


def _numpy_state() -> str:
    return repr(np.random.get_state())  # noqa: NPY002 - the global generator, on purpose
