from __future__ import annotations

import pytest
import torch

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.privacy.mechanism import Mechanism, poisson_batches


def test_poisson_batches_are_independent_draws_of_every_record() -> None:
    mechanism, steps = Mechanism(1.0, 1.0, 2, 20), 4000
    batches = list(poisson_batches(mechanism, steps, seed=1))
    sizes = torch.tensor([len(batch) for batch in batches], dtype=torch.float64)
    counts = torch.cat(batches).bincount(minlength=20) / steps

    assert len(batches) == steps
    assert all(batch.dtype == torch.int64 for batch in batches)
    assert sizes.mean().item() == pytest.approx(2, abs=0.09)  # four standard errors
    assert sizes.var().item() == pytest.approx(20 * 0.1 * 0.9, rel=0.1)
    assert (counts - 0.1).abs().max() < 4.5 * (0.1 * 0.9 / steps) ** 0.5
    assert (sizes == 0).double().mean().item() == pytest.approx(0.9**20, abs=0.025)


@pytest.mark.parametrize("other", [2, 1 + 2**32])
def test_poisson_batches_follow_all_bits_of_their_seed(other: int) -> None:
    mechanism = Mechanism(1.0, 1.0, 16, 64)
    drawn = {
        seed: [batch.tolist() for batch in poisson_batches(mechanism, 5, seed)]
        for seed in (1, other)
    }

    assert drawn[1] == [batch.tolist() for batch in poisson_batches(mechanism, 5, 1)]
    assert drawn[1] != drawn[other]


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("noise multiplier", {"noise_multiplier": -1.0}),
        ("noise multiplier", {"noise_multiplier": float("nan")}),
        ("clip-norm", {"clip_norm": 0.0}),
        ("clip-norm", {"clip_norm": float("nan")}),
        ("clip-norm", {"clip_norm": float("inf")}),
        ("batch-size", {"batch_size": 0}),
        ("batch-size", {"batch_size": 9}),
    ],
)
def test_a_mechanism_that_means_nothing_is_refused_by_name(
    key: str, changes: dict[str, float]
) -> None:
    usual = {"noise_multiplier": 1.0, "clip_norm": 1.0, "batch_size": 4, "num_records": 8}

    with pytest.raises(InvalidValue) as caught:
        Mechanism(**{**usual, **changes})  # type: ignore[arg-type]

    assert caught.value.key == key
