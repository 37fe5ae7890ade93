from __future__ import annotations

import pytest
import torch

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.forecast.memory import Memory
from fedlora_flwr.forecast.placement import CONTEXT, Placement, fit, place
from tests.conftest import MakeConfig

GB = 10**9
# A client takes 3 GB and its process's context, the server 1 GB and its own.
MEMORY = Memory(GB, GB // 2, GB // 2, GB)
CLIENT, SERVER = 3 * GB + CONTEXT, GB + CONTEXT


@pytest.mark.parametrize(
    ("free", "cores", "asked", "expected"),
    [
        ([SERVER + 4 * CLIENT], 16, None, Placement(4, 1 / 4)),
        ([SERVER + 4 * CLIENT - 1], 16, None, Placement(3, 1 / 3)),
        ([SERVER + 4 * CLIENT], 2, None, Placement(2, 1 / 2)),
        ([SERVER + 4 * CLIENT], 16, 1, Placement(1, 1.0)),
        ([SERVER + 4 * CLIENT], 2, 4, Placement(4, 1 / 4)),
        ([SERVER + 4 * CLIENT, 4 * CLIENT], 16, None, Placement(8, 1 / 4)),
        ([SERVER + 4 * CLIENT, 4 * CLIENT], 16, 3, Placement(3, 1 / 2)),
        ([SERVER, 2 * CLIENT], 16, None, Placement(2, 1.0)),
    ],
)
def test_as_many_workers_as_have_room(
    free: list[int], cores: int, asked: int | None, expected: Placement
) -> None:
    assert fit(MEMORY, free, cores, asked) == expected


def test_workers_that_do_not_fit_are_refused_with_how_many_do() -> None:
    with pytest.raises(InvalidValue, match=r"workers = 5.*at most 4: one needs about 3\.7 GB"):
        fit(MEMORY, [SERVER + 4 * CLIENT], 16, 5)


def test_a_client_that_does_not_fit_is_refused_with_what_helps() -> None:
    with pytest.raises(InvalidValue, match=r"3\.7 GB, and 2\.0 GB .*microbatch-size"):
        fit(MEMORY, [SERVER + 2 * GB], 16, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what holds without a GPU")
@pytest.mark.parametrize("workers", [None, 3])
def test_on_a_cpu_nothing_is_limited(make_config: MakeConfig, workers: int | None) -> None:
    assert place(make_config(device="auto"), workers) == Placement(workers)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_batch_too_large_for_the_gpu_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(InvalidValue, match="room for a client"):
        place(make_config(device="cuda", batch_size=10**9), None)
