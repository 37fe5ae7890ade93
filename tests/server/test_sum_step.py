"""A run by a simulated secure sum, against central DP-SGD on all records, written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, MessageType

from fedlora_flwr.cli.run_screen import SIMULATED, closing_rows, describe_plan
from fedlora_flwr.client_app import app
from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import FederationAborted, InvalidValue
from fedlora_flwr.layout import factor_of
from fedlora_flwr.privacy.budget import calibrate
from fedlora_flwr.secure_sum.grid import Grid
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.server.serve import run_federation
from fedlora_flwr.server.sum_step import SumStep
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.simulations.runner import prepare_run
from tests.conftest import MakeConfig

SUM: dict[str, Any] = {
    "trust_model": "secure-sum", "sample_rate": 0.1, "local_steps": 1, "num_clients": 4,
    "num_rounds": 2, "dropouts": 1, "delta": 5e-4, "epsilon": 8, "strategy": "ffa-lora",
    "eval_every": 2, "min_completion": 0,
}  # fmt: skip


def run(
    config: RunConfig, folder: Path, silent: tuple[int, ...] = ()
) -> tuple[RunDirectory, dict[str, Any]]:
    def some(message: Message, context: Context) -> Message:
        asked_to_train = message.metadata.message_type == MessageType.TRAIN
        if asked_to_train and context.node_config["partition-id"] in silent:
            raise RuntimeError("gone")
        return app(message, context)

    run_dir = RunDirectory(folder)
    with LocalGrid(some, config.num_clients, config.items()).running() as grid:
        return run_dir, run_federation(grid, config, run_dir)


@pytest.mark.parametrize("head", [1.0, 0.125])
def test_a_round_is_a_step_of_dp_sgd_on_the_union(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: float
) -> None:
    """Every record joins, so that only the noise is left between both."""
    one_round = {"sample_rate": 1.0, "num_rounds": 1, "eval_every": 1, "clip_weight_head": head}
    config = make_config(**{**SUM, **one_round})
    after: dict[str, Any] = {}
    step = SumStep.step

    def watched(self: SumStep, *given: Any) -> Any:
        after.update(step(self, *given))
        return after

    monkeypatch.setattr(SumStep, "step", watched)
    run(config, tmp_path / "run")

    trainer = LocalTrainer.build(config)
    total: dict[str, Any] = dict.fromkeys(after, 0.0)
    count = 0
    for client in range(3):
        records = trainer.task.client_records(client, 3)
        everything = torch.arange(len(records))
        gradients = trainer.engine.gradients_by_record(records, everything, list(after))
        for name in gradients:
            gradients[name] = gradients[name] * (head if name.startswith("head") else 1.0)
        lengths = torch.cat([g.flatten(1) for g in gradients.values()], dim=1).norm(dim=1)
        factors = (config.clip_norm / lengths).clamp(max=1)
        for name, gradient in gradients.items():
            total[name] = total[name] + torch.tensordot(factors, gradient, dims=1).numpy()
        count += len(records)
    sigma = calibrate(config.epsilon, config.delta, 1.0, 1)
    noise = np.concatenate(
        [
            (moved * (head if name.startswith("head") else 1.0) - total[name]).ravel()
            for name, moved in (
                (n, (trainer.start[n] - after[n]) / config.lr_b * count) for n in after
            )
        ]
    )

    # Shares for two of the three clients, who all answered.
    expected = sigma * config.clip_norm * np.sqrt(3 / 2)
    assert noise.std() == pytest.approx(expected, rel=5 / np.sqrt(2 * noise.size))
    assert noise.mean() == pytest.approx(0, abs=5 * expected / np.sqrt(noise.size))


def test_screen_summary_and_rows_say_that_the_sum_was_simulated(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(**SUM)

    run_dir, summary = run(config, tmp_path / "run", silent=(1,))

    assert summary["trust_model"] == "secure-sum"
    assert summary["remarks"]["secure sum"].startswith("simulated")
    card = (run_dir.adapter / "README.md").read_text("utf-8")
    assert "| trust model | `secure-sum`, simulated: this process sees every upload, and" in card
    assert [(row["shares"], row["opened"]) for row in run_dir.rows("rounds")[1:]] == [(3, True)] * 2
    assert 0 < summary["epsilon_max"] <= 8
    assert any(name == "Secure sum" for name, _ in closing_rows(summary))
    screen = " ".join(text for _, text in describe_plan(prepare_run(config)))
    assert SIMULATED in screen
    assert "of all clients together" in screen


def test_one_dropout_too_many_leaves_the_round_void(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(**SUM)

    run_dir, summary = run(config, tmp_path / "run", silent=(0, 2))

    rows = run_dir.rows("rounds")
    assert [row["opened"] for row in rows[1:]] == [False, False]
    assert summary["final_accuracy"] == summary["initial_accuracy"]
    # The share has left the client, and counts.
    assert rows[2]["epsilon_max"] > rows[1]["epsilon_max"] > 0


def test_a_void_round_ends_the_run_where_too_few_answer(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(FederationAborted, match="min-completion"):
        run(make_config(**{**SUM, "min_completion": 0.6}), tmp_path / "run", silent=(0, 2))


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        ("as-lora", {"filter": "binomial"}),
        ("la-lora", {"momentum": 0.5, "filter": "ema"}),
        ("fedsvd", {}),
        ("ffa-seeds", {}),
        ("dp-lora", {"optimizer": "adamw"}),
        ("rolora", {"precondition": True, "lr_schedule": "linear:0.1"}),
    ],
)
def test_every_method_of_means_runs(
    make_config: MakeConfig, tmp_path: Path, strategy: str, changes: dict[str, Any]
) -> None:
    config = make_config(**{**SUM, "strategy": strategy, **changes})

    run_dir, summary = run(config, tmp_path / "run")

    assert summary["status"] == "completed"
    assert summary["failures"] == 0
    plans = [row["plan"] for row in run_dir.rows("rounds")[1:]]
    assert strategy not in ("la-lora", "rolora") or plans == ["B", "A"]


@pytest.mark.parametrize(
    ("key", "changes"),
    [("delta", {"delta": 9e-4}), ("least-shares", {"least_shares": 4})],
)
def test_a_promise_that_cannot_be_kept_to_the_union_is_refused_before_the_run(
    make_config: MakeConfig, key: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(InvalidValue) as caught:
        prepare_run(make_config(**{**SUM, **changes}))

    assert caught.value.key == key


def test_the_step_divides_by_the_expected_number_of_records_and_knows_each_rate(
    make_config: MakeConfig,
) -> None:
    config = make_config(
        **{**SUM, "clip_norm": 0.5, "lr_a": 0.1, "lr_head": 0.3, "lr_schedule": "linear:0.5"}
    )
    trainer = LocalTrainer.build(config)
    step = SumStep(config, trainer.adapted, Grid.of(2.0, 2, 4096), 1000)
    names = [name for name in trainer.start if factor_of(name) != "B"]
    total = {name: np.full(trainer.start[name].shape, 8192, np.int64) for name in names}

    after = step.step(2, trainer.start, total, 400)

    change = config.learning_rates(2)[0] / config.lr_a
    assert 0 < change < 1
    assert set(after) == set(names)
    for name in names:
        rate = change * (0.1 if factor_of(name) else 0.3)
        # Twice the clip norm, over q·Σn = 40 records.
        assert trainer.start[name] - after[name] == pytest.approx(rate * 2 * 0.5 / 40, rel=1e-3)


def test_momentum_of_a_factor_lasts_over_the_rounds_of_the_other(make_config: MakeConfig) -> None:
    config = make_config(**{**SUM, "momentum": 0.5, "lr_b": 1.0})
    trainer = LocalTrainer.build(config)
    step, arrays = (
        SumStep(config, trainer.adapted, Grid.of(2.0, 2, 4096), 1000),
        dict(trainer.start),
    )
    chosen = {factor: [n for n in arrays if factor_of(n) == factor] for factor in ("A", "B")}
    moved = []
    for server_round, factor in enumerate(("B", "A", "B"), start=1):
        total = {name: np.full(arrays[name].shape, 4096, np.int64) for name in chosen[factor]}
        after = step.step(server_round, arrays, total, 10)
        moved.append(float((arrays[chosen[factor][0]] - after[chosen[factor][0]]).mean()))
        arrays.update(after)

    # A gradient of 1 each time: the second step of B adds half of its first, whatever A did.
    assert moved[2] == pytest.approx(1.5 * moved[0], rel=1e-3)
