from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedlora_flwr.clients.local_round import LocalRound
from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.data.records import Batch
from fedlora_flwr.environment import simulating
from fedlora_flwr.errors import InvalidValue, OrderRefused, PrivacyViolation
from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.privacy.ledger import Ledger
from fedlora_flwr.wire.order import Order
from tests.conftest import MakeConfig

# Runs where nothing of Flower, gRPC or Ray can be imported.
ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("flwr", "grpc", "ray"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
from pathlib import Path
from fedlora_flwr.clients.local_round import LocalRound
from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.privacy.ledger import Ledger
from fedlora_flwr.wire.order import Order

config = RunConfig.of({"num-clients": 3, "num-rounds": 2, "partitioner": "iid", "device": "cpu"})
trainer = LocalTrainer.build(config)
records = trainer.task.client_records(0, 3)
local_round = LocalRound(trainer, records, Ledger(Path(sys.argv[1])), "one", "run")
released = local_round.run(Order(server_round=1, plan="B"), dict(local_round.start))
print(*(sum(factor in name for name in released.arrays) for factor in ("lora_A", "lora_B")))
print(released.ledger.steps, 0 < released.ledger.epsilon < config.epsilon, released.num_examples)
"""


def test_a_round_needs_nothing_of_flower(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ALONE, str(tmp_path / "ledger.sqlite")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    factors, account = done.stdout.strip().splitlines()[-2:]
    assert factors.split()[0] == "0"
    assert int(factors.split()[1]) > 0
    assert account == "5 True 1"


def round_of(make_config: MakeConfig, tmp_path: Path, **changes: object) -> LocalRound:
    trainer = LocalTrainer.build(make_config(**changes))
    records = trainer.task.client_records(0, 3)
    return LocalRound(trainer, records, Ledger(tmp_path / "ledger.sqlite"), "one", "run")


def test_the_number_of_records_is_released_only_where_it_is_the_weight(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    local_round = round_of(make_config, tmp_path, weighting="size")
    arrays = dict(local_round.start)
    told = local_round.run(Order(server_round=1, plan="B", weighting="size"), arrays)
    untold = local_round.run(Order(server_round=2, plan="B"), arrays)
    assert told.num_examples == told.weight > 100
    assert (untold.num_examples, untold.weight) == (1, 1.0)


def test_a_server_without_plans_gets_the_arrays_that_it_sent(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    local_round = round_of(make_config, tmp_path)
    turned = dict(reversed(list(local_round.start.items())))
    released = local_round.run(Order(server_round=1), turned)
    assert list(released.arrays) == list(turned)
    assert all(np.any(released.arrays[name] != array) for name, array in turned.items())


def test_a_refused_order_opens_no_record_and_writes_no_row(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    opened: list[int] = []
    trainer = LocalTrainer.build(make_config())
    ledger = Ledger(tmp_path / "ledger.sqlite")

    def open_records() -> object:
        opened.append(1)
        raise AssertionError("a record was opened")

    local_round = LocalRound(trainer, open_records, ledger, "one", "run")  # type: ignore[arg-type]
    with pytest.raises(OrderRefused, match="missing"):
        local_round.run(Order(server_round=1, plan="B"), {})
    with pytest.raises(OrderRefused, match="backbone"):
        local_round.run(Order(server_round=1, plan="B", fingerprint="0" * 16), dict(trainer.start))
    assert not opened
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as db:
        assert db.execute("SELECT COUNT(*) FROM releases").fetchone() == (0,)


def test_records_of_another_kind_are_refused_before_a_row_is_written(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    trainer = LocalTrainer.build(make_config())
    data = TensorDataset(torch.zeros(5, 2), torch.zeros(5))
    ledger = Ledger(tmp_path / "ledger.sqlite")
    with pytest.raises(InvalidValue, match=r"records = 'TensorDataset'.*TensorRecords"):
        LocalRound(trainer, data, ledger, "one", "run")  # type: ignore[arg-type]
    late = LocalRound(trainer, lambda: data, ledger, "one", "run")  # type: ignore[arg-type,return-value]
    with pytest.raises(InvalidValue, match="records = 'TensorDataset'"):
        late.run(Order(server_round=1, plan="B"), dict(late.start))
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as db:
        assert db.execute("SELECT COUNT(*) FROM releases").fetchone() == (0,)


@pytest.mark.parametrize("device", [True, False])
def test_a_device_looks_at_the_model_in_each_round_and_a_simulation_does_not(
    make_config: MakeConfig, tmp_path: Path, device: bool
) -> None:
    """Arrays of a server may let a model mix records that was sound at those of the last round."""
    trainer = LocalTrainer.build(make_config())
    mixes: list[bool] = []

    def losses(model: nn.Module, batch: Batch) -> torch.Tensor:
        found = trainer.task.losses(model, batch)
        return found + found.detach().mean() * found if mixes else found

    watched = replace(trainer, engine=PrivateEngine(trainer.adapted, losses))
    records, ledger = trainer.task.client_records(0, 3), Ledger(tmp_path / "ledger.sqlite")
    local_round = LocalRound(watched, records, ledger, "one", "run")
    with nullcontext() if device else simulating():
        local_round.run(Order(server_round=1, plan="B"), dict(trainer.start))
        mixes.append(True)
        with pytest.raises(PrivacyViolation, match="other records") if device else nullcontext():
            local_round.run(Order(server_round=2, plan="B"), dict(trainer.start))
