"""Torch's random numbers from a seed, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of the CPU and of all accelerators, and restore their states afterwards.

    ``torch.manual_seed`` keeps the whole stack as text for each kind of accelerator that is not
    there. That takes milliseconds at each call, and the texts are never dropped.

    Parameters
    ----------
    seed : int
        From -2**63 to 2**64 - 1.
    """
    if not torch.accelerator.is_available():
        with seeded_on_cpu(seed):
            yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def seeded_on_cpu(seed: int) -> Iterator[None]:
    """Seed the CPU's generator alone, and restore its state afterwards.

    ``torch.manual_seed`` would also seed the accelerators, whose states are not restored here.

    Parameters
    ----------
    seed : int
        From -2**63 to 2**64 - 1.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
