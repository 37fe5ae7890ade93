from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from peft import PeftModel

from fedlora_flwr.cli.round_line import describe_round
from fedlora_flwr.cli.run_screen import closing_rows
from fedlora_flwr.client_app import app
from fedlora_flwr.config import RunConfig, read_toml
from fedlora_flwr.errors import FederationAborted, InvalidValue
from fedlora_flwr.forecast.participation import participation
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.server.serve import run_federation
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.tasks.registry import build_task
from tests.conftest import MakeConfig
from tests.server.support import adapter, run


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return set(one) == set(other) and all(np.array_equal(one[name], other[name]) for name in one)


def joined(run_dir: RunDirectory) -> Counter[str]:
    return Counter(row["client"] for row in run_dir.rows("clients"))


def test_a_tight_cap_fills_every_cohort_and_spends_every_budget(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(num_clients=4, fraction_train=0.5, num_rounds=4, max_rounds=2)
    run_dir, summary = run(config, tmp_path / "run")
    assert (summary["status"], summary["end"]) == ("completed", "all rounds are done")
    rows = run_dir.rows("rounds")[1:]
    assert [row["clients_used"] for row in rows] == [2] * 4
    assert not any(row["declined"] or row["failures"] for row in rows)
    assert joined(run_dir) == {f"partition-{client:06d}": 2 for client in range(4)}
    # σ is made for two rounds a client, and each one's ledger has exactly those.
    assert participation(config).most == 2
    last = {row["client"]: row for row in run_dir.rows("clients")}
    assert {row["steps"] for row in last.values()} == {config.planned_steps}
    assert 0.99 * config.epsilon < summary["epsilon_max"] <= config.epsilon


def test_a_run_whose_budgets_end_first_is_complete_in_the_round_that_was_planned(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(
        num_clients=4, fraction_train=0.5, num_rounds=8, max_rounds=1, eval_every=5
    )
    planned = participation(config)
    run_dir, summary = run(config, tmp_path / "run")
    assert (summary["status"], summary["end"]) == ("completed", "no client has budget left")
    assert (summary["rounds_done"], summary["num_rounds"]) == (planned.last_round, 8) == (2, 8)
    assert joined(run_dir) == {f"partition-{client:06d}": planned.most for client in range(4)}
    # The last round is measured although it is not the fifth.
    rows = run_dir.rows("rounds")
    assert ["accuracy" in row for row in rows] == [True, False, True]
    assert summary["final_accuracy"] == rows[-1]["accuracy"]
    time = dict(closing_rows(summary))["Time"]
    assert time.endswith("for 2 of 8 rounds: no client has budget left")


def test_plain_peft_loads_the_adapter_with_the_final_accuracy(
    finished: tuple[RunConfig, RunDirectory],
) -> None:
    config, run_dir = finished
    task = build_task(config.task, config)
    model = PeftModel.from_pretrained(task.build_model(), str(run_dir.adapter))
    model.eval()
    summary = run_dir.summary()
    assert summary is not None
    measured = task.evaluate(model, task.test_records())
    assert measured["accuracy"] == summary["final_accuracy"]
    assert summary["final_accuracy"] != summary["initial_accuracy"]
    assert measured["loss"] == pytest.approx(run_dir.rows("rounds")[-1]["loss"], rel=1e-6)


def test_a_seed_repeats_a_run_and_another_does_not(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(num_clients=4, fraction_train=0.5)
    first, _ = run(config, tmp_path / "first")
    again, _ = run(config, tmp_path / "again")
    other, _ = run(replace(config, seed=7), tmp_path / "other")
    assert equal(adapter(first), adapter(again))
    assert not equal(adapter(first), adapter(other))


def test_the_written_configuration_repeats_the_run(
    finished: tuple[RunConfig, RunDirectory], tmp_path: Path
) -> None:
    config, run_dir = finished
    read = RunConfig.of(read_toml(run_dir.path / "config.toml"))
    assert read == config
    again, _ = run(read, tmp_path / "again")
    assert equal(adapter(run_dir), adapter(again))


def test_noise_without_a_seed_differs(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(reproducible=False, num_rounds=1)
    first, summary = run(config, tmp_path / "first")
    second, _ = run(config, tmp_path / "second")
    assert not equal(adapter(first), adapter(second))
    assert summary["reproducible_noise"] is False


def test_a_failing_run_says_why_and_raises(make_config: MakeConfig, tmp_path: Path) -> None:
    # No client has that many records.
    config = make_config(batch_size=1000)
    with pytest.raises(FederationAborted):
        run(config, tmp_path / "run")
    summary = RunDirectory(tmp_path / "run").summary()
    assert summary is not None
    assert summary["status"] == "failed"
    assert summary["error"].startswith("FederationAborted: Round 1: 0 of 3 clients answered")
    assert "batch-size = 1000" in summary["error"]
    assert (summary["rounds_done"], summary["epsilon_max"]) == (0, 0.0)
    assert summary["initial_accuracy"] == summary["final_accuracy"] > 0


def test_a_run_that_dies_later_keeps_its_last_round(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    def respond(message: Message, context: Context) -> Message:
        asked: Any = message.content.config_records.get("config", {})
        if message.metadata.message_type == "train" and asked["server-round"] == 3:
            raise MemoryError("no room")
        return app(message, context)

    config, run_dir = make_config(num_rounds=3), RunDirectory(tmp_path / "run")
    with (
        LocalGrid(respond, config.num_clients, config.items()).running() as grid,
        pytest.raises(FederationAborted, match="Round 3: 0 of 3 clients answered"),
    ):
        run_federation(grid, config, run_dir)
    summary = run_dir.summary()
    assert summary is not None
    assert (summary["status"], summary["rounds_done"]) == ("failed", 2)
    assert summary["final_accuracy"] == run_dir.rows("rounds")[2]["accuracy"]
    assert adapter(run_dir)


def test_what_is_no_strategy_fails_before_training(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="a subclass of FedLoRA"):
        run(make_config(strategy="json:JSONDecoder"), tmp_path / "run")
    summary = RunDirectory(tmp_path / "run").summary()
    assert summary is not None
    assert summary["status"] == "failed"
    assert summary["final_accuracy"] is None
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def test_another_runs_results_are_not_touched(
    finished: tuple[RunConfig, RunDirectory],
) -> None:
    config, run_dir = finished
    files = ("rounds.jsonl", "summary.json", "config.toml")
    before = [(run_dir.path / name).read_bytes() for name in files]
    with pytest.raises(InvalidValue, match="run-dir"):
        run(replace(config, seed=3), run_dir.path)
    assert [(run_dir.path / name).read_bytes() for name in files] == before


def test_rounds_that_are_not_due_are_trained_and_not_evaluated(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    every, _ = run(make_config(num_rounds=5), tmp_path / "every")
    lines: list[str] = []
    seldom, summary = run(
        make_config(num_rounds=5, eval_every=2, state_dir=str(tmp_path / "other")),
        tmp_path / "seldom",
        on_round=lambda row: lines.append(describe_round(row)),
    )

    scores = {row["round"]: row.get("accuracy") for row in every.rows("rounds")}
    found = {row["round"]: row.get("accuracy") for row in seldom.rows("rounds")}
    # The last round is evaluated wherever it falls.
    assert found == {**scores, 1: None, 3: None}
    assert summary["initial_accuracy"] == scores[0]
    assert summary["final_accuracy"] == scores[5]
    assert equal(adapter(every), adapter(seldom))
    assert lines[2].startswith("accuracy ")
    assert lines[3].startswith("ε ")


def test_a_moving_average_is_what_is_kept_and_training_does_not_see_it(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    models: list[dict[str, Any]] = []
    plain = RunDirectory(tmp_path / "plain")
    run(make_config(), plain.path, on_round=lambda _: models.append(adapter(plain)))
    config = make_config(average_decay=0.05, state_dir=str(tmp_path / "other"))

    averaged, _ = run(config, tmp_path / "averaged")

    # Both of its rounds are past the warm-up.
    weights = (0.05 * 0.05, 0.05 * 0.95, 0.95)
    for name, array in adapter(averaged).items():
        mean = sum(w * model[name] for w, model in zip(weights, models, strict=True))
        np.testing.assert_allclose(array, mean, rtol=0, atol=1e-6)
        assert not np.array_equal(array, models[-1][name])
    sent = [[row["epsilon"] for row in d.rows("clients")] for d in (plain, averaged)]
    assert sent[0] == sent[1]
    task = build_task(config.task, config)
    model = PeftModel.from_pretrained(task.build_model(), str(averaged.adapter)).eval()
    measured = task.evaluate(model, task.test_records())
    assert measured["loss"] == averaged.rows("rounds")[-1]["loss"]
