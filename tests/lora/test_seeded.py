from __future__ import annotations

import torch

from fedlora_flwr.lora.seeded import seeded


def test_what_is_drawn_is_what_the_seed_gives_and_the_state_is_as_before() -> None:
    before = torch.get_rng_state()
    with seeded(2**63 - 1):
        drawn = torch.rand(5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn, torch.rand(5, generator=torch.Generator().manual_seed(2**63 - 1)))


def test_nothing_is_kept_for_an_accelerator_that_is_not_there() -> None:
    kept = len(torch.cuda._queued_calls)
    with seeded(1):
        assert len(torch.cuda._queued_calls) == kept
