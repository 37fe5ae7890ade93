"""When a client uploads a share of a secure sum, and when it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedlora_flwr.clients.local_round import LocalRound
from fedlora_flwr.clients.sharing import check_order
from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.environment import simulating
from fedlora_flwr.errors import InvalidValue, OrderRefused
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.privacy.calibration import calibrated_mechanism
from fedlora_flwr.privacy.ledger import Ledger
from fedlora_flwr.wire.order import Order
from tests.conftest import MakeConfig

B = ComponentPlan.parse("B")
ORDER = Order(1, "B", cohort=5, sum_noise=5.0, grid_norm=2**16)
SUM: dict[str, Any] = {
    "trust_model": "secure-sum", "sample_rate": 0.05, "local_steps": 1, "num_clients": 5,
    "dropouts": 1, "colluding": 1, "delta": 1e-5, "epsilon": 4, "strategy": "ffa-lora",
}  # fmt: skip


@pytest.fixture
def simulated() -> Iterator[None]:
    with simulating():
        yield


@pytest.fixture
def config(make_config: MakeConfig) -> RunConfig:
    return make_config(**SUM)


@pytest.mark.usefixtures("simulated")
def test_the_shares_are_those_of_the_clients_that_remain(config: RunConfig) -> None:
    assert check_order(ORDER, config) == 3


def test_nothing_leaves_a_device_that_nothing_masks(config: RunConfig) -> None:
    with pytest.raises(OrderRefused, match="asks for an upload without masks"):
        check_order(ORDER, config)


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize(
    ("order", "reason"),
    [
        (Order(1, "B"), "needs a plan, the number of clients asked"),
        (replace(ORDER, plan=""), "needs a plan, the number of clients asked"),
        (Order(1, "B", cohort=5, sum_noise=5.0), "needs a plan, the number of clients asked"),
        (Order(1, "B", cohort=5, grid_norm=2**16), "needs a plan, the number of clients asked"),
        (Order(1, "B", cohort=2, sum_noise=5.0, grid_norm=2**16), "fewer than the 2 clients"),
        (Order(1, "B", cohort=5, sum_noise=5.0, grid_norm=2**16), "shared among 3 clients"),
        (Order(1, "B", cohort=4, sum_noise=5.0, grid_norm=2**16), "at most 0 where 4 clients"),
    ],
)
def test_too_small_a_cohort_or_half_an_order_is_refused(
    make_config: MakeConfig, order: Order, reason: str
) -> None:
    with pytest.raises(OrderRefused, match=reason):
        check_order(order, make_config(**SUM, least_shares=4))


def test_a_client_that_adds_all_its_noise_gives_no_share(make_config: MakeConfig) -> None:
    assert check_order(Order(1, "B"), make_config()) == 0
    with pytest.raises(OrderRefused, match="asks for a share of a secure sum"):
        check_order(ORDER, make_config())


@pytest.mark.usefixtures("simulated")
def test_a_round_releases_a_share_and_writes_which(config: RunConfig, tmp_path: Any) -> None:
    trainer = LocalTrainer.build(config)
    records = trainer.task.client_records(0, 5)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    client = LocalRound(trainer, records, ledger, "one", "run")

    released = client.run(ORDER, trainer.start)

    assert not released.arrays
    assert released.shares["num-examples"].tolist() == [len(records)]
    assert {share.dtype for share in released.shares.values()} == {np.dtype(np.uint32)}
    report = released.report()
    assert report.shares.keys() == released.shares.keys()
    assert report.num_examples == 1  # The number of records is told in the sum alone.
    with ledger._file.reading() as db:
        (row,) = db.execute(
            "SELECT trust, noise_multiplier, sample_rate, steps FROM releases"
        ).fetchall()
    assert row == ("secure-sum, 1 of 3 shares", 5.0, 0.05, 1)


@pytest.mark.usefixtures("simulated")
def test_a_sum_with_less_noise_than_the_clients_own_budget_needs_is_refused(
    config: RunConfig, tmp_path: Any
) -> None:
    trainer = LocalTrainer.build(config)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    records = trainer.task.client_records(0, 5)
    needed = calibrated_mechanism(config, len(records)).noise_multiplier
    # If it took part, the others would add less noise than its ledger counts on.
    weak = replace(ORDER, sum_noise=needed * 0.99)

    with pytest.raises(InvalidValue, match=r".* the noise that this client's budget needs"):
        LocalRound(trainer, records, ledger, "one", "run").run(weak, trainer.start)

    with ledger._file.reading() as db:
        assert db.execute("SELECT COUNT(*) FROM releases").fetchone() == (0,)
