"""What real clients that go wrong do to a round: its outcome, what is told, and their ledgers."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from numpy.typing import NDArray
from safetensors.numpy import load

from fedlora_flwr.cli.run_screen import closing_rows
from fedlora_flwr.client_app import app
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import FederationAborted
from fedlora_flwr.privacy.calibration import calibrated_mechanism
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.server.serve import run_federation
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies.replies import to_record
from fedlora_flwr.tasks.digits import DigitsTask
from tests.conftest import MakeConfig

Numbers = dict[str, NDArray[Any]]
Fault = Callable[[Message, Context], Message]
BAD, STEPS = 1, 2
NAME = f"partition-{BAD:06d}"


class Unreadable(DigitsTask):
    """Cannot read one client's records, and says what is in them."""

    def client_records(self, partition: int, num_partitions: int) -> Any:
        """Raise as a library does."""
        if partition == BAD:
            raise ValueError("could not convert string to float: 'Jane Doe'")
        return super().client_records(partition, num_partitions)


def unreadable(message: Message, context: Context) -> Message:
    config = {**context.run_config, "task": f"{__name__}:Unreadable"}
    return app(message, Context(context.run_id, 2, context.node_config, context.state, config))


def other_backbone(message: Message, context: Context) -> Message:
    config = message.content.config_records["config"]
    told, config["fingerprint"] = config["fingerprint"], "0" * 16
    try:
        return app(message, context)
    finally:
        config["fingerprint"] = told


def spoilt(change: Callable[[Numbers], None]) -> Fault:
    """Answer honestly, ledger and all, with arrays that are changed on their way."""

    def fault(message: Message, context: Context) -> Message:
        reply = app(message, context)
        sent = reply.content.array_records["arrays"]
        arrays: Numbers = {name: array.numpy().copy() for name, array in sent.items()}
        change(arrays)
        reply.content["arrays"] = to_record(arrays)
        return reply

    return fault


def nan(arrays: Numbers) -> None:
    first = next(iter(arrays.values()))
    first[0, 0] = np.nan


def shape(arrays: Numbers) -> None:
    name, first = next(iter(arrays.items()))
    arrays[name] = first.T.copy()


def frozen(arrays: Numbers) -> None:
    name = next(iter(arrays))
    arrays[name.replace("lora_B", "lora_A")] = arrays[name]


def unknown(arrays: Numbers) -> None:
    arrays["backdoor.weight"] = arrays.pop(next(iter(arrays)))


# The fault, the client's line in the round's failures, and the rows of its ledger.
FAULTS: Mapping[str, tuple[Fault, str, int]] = {
    "raises": (unreadable, "ValueError on the client; its own log says more", 0),
    "other backbone": (other_backbone, "their frozen weights differ", 0),
    "NaN": (spoilt(nan), "= 'NaN or infinity' cannot be used: expected finite numbers.", 1),
    "shape": (spoilt(shape), "shape of ", 1),
    "frozen factor": (spoilt(frozen), "uploaded arrays = ", 1),
    "unknown name": (spoilt(unknown), "uploaded arrays = ", 1),
}


class Outcome:
    """A run of one round in which a client went wrong."""

    def __init__(self, config: RunConfig, folder: Path, fault: Fault) -> None:
        def respond(message: Message, context: Context) -> Message:
            bad = context.node_config["partition-id"] == BAD
            return (fault if bad and message.metadata.message_type == "train" else app)(
                message, context
            )

        self.run_dir = RunDirectory(folder)
        self.arrays: Numbers = {}
        with LocalGrid(respond, config.num_clients, config.items()).running() as grid:
            run_federation(grid, config, self.run_dir)
        (self.round,) = self.run_dir.rows("rounds")[1:]
        self.adapter = (self.run_dir.adapter / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def config(make_config: MakeConfig) -> RunConfig:
    return make_config(strategy="ffa-lora", num_clients=3, num_rounds=1, local_steps=STEPS)


def ledger(config: RunConfig, client: str) -> int:
    with closing(sqlite3.connect(Path(config.state_dir) / "ledger.sqlite")) as db:
        found = db.execute("SELECT COUNT(*) FROM releases WHERE client = ?", [client]).fetchone()
    return int(found[0])


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_client_is_a_failure_by_name_and_nothing_of_it_goes_in(
    name: str, config: RunConfig, tmp_path: Path
) -> None:
    fault, reason, rows = FAULTS[name]
    found = Outcome(config, tmp_path / "run", fault)
    assert (found.round["clients_asked"], found.round["clients_used"]) == (3, 2)
    (line,) = found.round["failures"]
    assert reason in line
    assert "Jane Doe" not in line
    assert line.startswith(f"{NAME}: ")
    assert [ledger(config, f"partition-{i:06d}") for i in range(3)] == [1, rows, 1]

    def silent(message: Message, context: Context) -> Message:
        raise RuntimeError

    other = RunConfig.of(config.items(), {"state-dir": str(tmp_path / "other")})
    assert found.adapter == Outcome(other, tmp_path / "without", silent).adapter


def far(arrays: Numbers) -> None:
    for name in arrays:  # B starts from zero, so the update is the array.
        arrays[name] = 100 * arrays[name]


def test_an_upload_that_cannot_be_honest_is_dropped_and_its_client_named(
    config: RunConfig, tmp_path: Path
) -> None:
    noise = calibrated_mechanism(config, len(DigitsTask(config).client_records(0, 3)))
    bounded = RunConfig.of(config.items(), {"largest-noise": noise.noise_multiplier})
    found = Outcome(bounded, tmp_path / "run", spoilt(far))
    (line,) = found.round["failures"]
    assert line.startswith(f"{NAME}: its update of B has norm ")
    assert found.round["suspects"] == [NAME]
    summary = found.run_dir.summary()
    assert summary is not None
    assert (summary["robust"], summary["suspects"]) == ("norm-bound", {NAME: 1})
    assert ("Suspects", f"{NAME} in 1 round") in closing_rows(summary)

    other = RunConfig.of(bounded.items(), {"state-dir": str(tmp_path / "other")})
    assert found.adapter == Outcome(other, tmp_path / "without", unreadable).adapter


def test_a_round_that_too_few_survive_ends_the_run_and_keeps_the_last_good_adapter(
    config: RunConfig, tmp_path: Path
) -> None:
    strict = RunConfig.of(config.items(), {"min-completion": 1.0})
    with pytest.raises(FederationAborted, match=r"Round 1: 2 of 3 clients answered, fewer than"):
        Outcome(strict, tmp_path / "run", spoilt(nan))
    run_dir = RunDirectory(tmp_path / "run")
    summary = run_dir.summary()
    assert summary is not None
    assert summary["status"] == "failed"
    assert "NaN or infinity" in summary["error"]
    # Nobody's B has moved: it starts from zero, and so it was kept before the round.
    kept = load((run_dir.adapter / "adapter_model.safetensors").read_bytes())
    factors = [array for name, array in kept.items() if "lora_B" in name]
    assert factors
    assert not any(array.any() for array in factors)


class MutedAfterTraining(LocalGrid):
    """Loses what the last node answers when it is asked to measure its model."""

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        lost = max(self.get_node_ids())
        for reply in super().send_and_receive(messages, timeout=timeout):
            about = reply.metadata
            if (about.src_node_id, about.message_type) != (lost, "evaluate"):
                yield reply


def test_a_client_that_does_not_measure_its_model_in_time_is_a_failure(
    config: RunConfig, tmp_path: Path
) -> None:
    run_dir = RunDirectory(tmp_path / "run")
    fedsa = RunConfig.of(config.items(), {"strategy": "fedsa-lora"})
    with MutedAfterTraining(app, 3, fedsa.items()).running() as grid:
        run_federation(grid, fedsa, run_dir)
    (row,) = run_dir.rows("rounds")[1:]
    assert row["clients_used"] == 3
    (line,) = row["failures"]
    assert line in [f"partition-{i:06d}: no measurement in time" for i in range(3)]
