"""A run whose command names one strategy does not run another one."""

from __future__ import annotations

import pytest
from flwr.supercore.run import Run

from fedlora_flwr import FFALoRA, RoLoRA
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies.base import FedLoRA
from tests.strategies.tiny import Tiny, record_of, start_arrays


class Mine(FFALoRA):
    """A project's own strategy, made of one of this package."""


class Told(LocalGrid):
    """A grid whose run was started with ``--run-config``."""

    given: dict[str, str]

    @property
    def run(self) -> Run:
        run = super().run
        run.override_config = {**self.given}
        return run


def start(made: FedLoRA, /, **given: str) -> Tiny:
    tiny = Tiny(2)
    grid = Told(tiny.app(), 2, {})
    grid.given = {key.replace("_", "."): value for key, value in given.items()}
    with grid.running():
        made.start(grid, record_of(start_arrays()), num_rounds=1)
    return tiny


@pytest.mark.parametrize("key", ["strategy", "federation_strategy"])
@pytest.mark.parametrize("named", ["ffa-lora", "fedavg"])
def test_another_name_is_refused_before_any_client_is_asked(key: str, named: str) -> None:
    with pytest.raises(InvalidValue, match="strategy_of") as caught:
        start(RoLoRA(), **{key: named})

    assert (caught.value.key, caught.value.value) == ("strategy", named)


@pytest.mark.parametrize(
    ("strategy", "named"),
    [
        (FFALoRA(), "ffa-lora"),
        (Mine(), "ffa-lora"),
        (RoLoRA(), "a-word-of-the-projects-own"),
        (RoLoRA(), "module:Class"),
    ],
)
def test_a_name_that_fits_or_is_the_projects_own_runs(strategy: FedLoRA, named: str) -> None:
    assert len(start(strategy, strategy=named).asked) == 2
