from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from peft import PeftModel
from safetensors.numpy import load_file

from fedlora_flwr.cli.run_screen import closing_rows, describe_round
from fedlora_flwr.client_app import app
from fedlora_flwr.config import RunConfig, read_toml
from fedlora_flwr.errors import FederationAborted, InvalidValue
from fedlora_flwr.forecast.participation import participation
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.server.serve import run_federation
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.tasks.registry import build_task
from tests.conftest import MakeConfig

SUMMARY = {
    "status",
    "task",
    "strategy",
    "num_clients",
    "num_rounds",
    "metric",
    "rounds_done",
    "end",
    "initial_accuracy",
    "final_accuracy",
    "epsilon_max",
    "epsilon_budget",
    "delta",
    "accountant",
    "bytes_up",
    "bytes_up_adapters",
    "blocks",
    "bytes_down",
    "bytes_plain",
    "seconds",
    "failures",
    "declined",
    "seed",
    "reproducible_noise",
    "weighting",
    "trust_model",
    "remarks",
    "unprotected_metrics",
    "versions",
}


def run(config: RunConfig, folder: Path, **options: Any) -> tuple[RunDirectory, dict[str, Any]]:
    run_dir = RunDirectory(folder)
    with LocalGrid(app, config.num_clients, config.items()).running() as grid:
        return run_dir, run_federation(grid, config, run_dir, **options)


def adapter(run_dir: RunDirectory) -> dict[str, Any]:
    return dict(load_file(run_dir.adapter / "adapter_model.safetensors"))


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return set(one) == set(other) and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.fixture
def finished(make_config: MakeConfig, tmp_path: Path) -> tuple[RunConfig, RunDirectory]:
    config = make_config()
    return config, run(config, tmp_path / "run")[0]


def test_the_files_of_a_run(finished: tuple[RunConfig, RunDirectory]) -> None:
    files = {entry.name for entry in finished[1].path.iterdir()}
    results = {"config.toml", "rounds.jsonl", "clients.jsonl", "summary.json", "adapter"}
    assert files == {".claim", *results}


def test_the_summary_states_the_budgets_that_clients_told(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config, run_dir = make_config(), RunDirectory(tmp_path / "run")
    clients = {**config.items(), "epsilon": 4.0, "delta": 5e-4}
    with LocalGrid(app, config.num_clients, clients).running() as grid:
        summary = run_federation(grid, config, run_dir)
    assert (config.epsilon, config.delta) == (8.0, 1e-3)
    assert (summary["epsilon_budget"], summary["delta"]) == (4.0, 5e-4)


def test_the_summary(finished: tuple[RunConfig, RunDirectory]) -> None:
    config, run_dir = finished
    summary = run_dir.summary()
    assert summary is not None
    assert set(summary) == SUMMARY
    rounds, clients = run_dir.rows("rounds"), run_dir.rows("clients")
    assert (summary["status"], summary["end"]) == ("completed", "all rounds are done")
    assert (summary["task"], summary["strategy"]) == ("digits", "rolora")
    assert (summary["num_clients"], summary["num_rounds"], summary["rounds_done"]) == (3, 2, 2)
    assert (summary["seed"], summary["delta"], summary["epsilon_budget"]) == (42, 1e-3, 8.0)
    assert summary["initial_accuracy"] == rounds[0]["accuracy"]
    assert summary["final_accuracy"] == rounds[-1]["accuracy"]
    assert summary["epsilon_max"] == max(row["epsilon"] for row in clients)
    assert 0 < summary["epsilon_max"] <= config.epsilon
    assert summary["accountant"] == "prv"
    assert (summary["failures"], summary["declined"]) == (0, 0)
    assert summary["unprotected_metrics"] is False
    for key in ("bytes_up", "bytes_down", "bytes_plain"):
        assert summary[key] == sum(row[key] for row in rounds[1:]) > 0
    assert summary["bytes_up"] + summary["bytes_down"] < summary["bytes_plain"]


@pytest.mark.parametrize(
    ("filter_name", "schedule"),
    [
        ("none", "constant"),
        ("binomial", "constant"),
        ("ema", "constant"),
        ("none", "exponential:0.2"),
    ],
)
def test_the_noise_that_weights_tell_is_the_noise_in_the_mean(
    filter_name: str, schedule: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    """At this ε nearly all that differs between clients is noise, whose norm uploads show."""
    config = make_config(
        num_clients=4, num_rounds=2, local_steps=4, strategy="la-lora", filter=filter_name,
        weighting="inverse-noise", epsilon=0.5, lr_a=0.1, lr_b=0.2, lr_head=0.05,
        lr_schedule=schedule,
    )  # fmt: skip
    run_dir, _ = run(config, tmp_path / "run")
    for row in run_dir.rows("rounds")[1:]:
        assert set(row["noise"]) == set(row["spread"]) == {"A", "B", "head"}
        for part, norm in row["noise"].items():
            mean = math.hypot(row["spread"][part], row["signal"][part])
            assert norm == pytest.approx(mean, rel=0.12), (part, row["round"])


def test_without_such_weights_the_noise_is_nobody_s_to_tell(
    finished: tuple[RunConfig, RunDirectory],
) -> None:
    assert not any("noise" in row for row in finished[1].rows("rounds"))


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


def test_the_rows_of_a_run(finished: tuple[RunConfig, RunDirectory]) -> None:
    run_dir = finished[1]
    rounds, clients = run_dir.rows("rounds"), run_dir.rows("clients")
    assert [row["round"] for row in rounds] == [0, 1, 2]
    assert [row["plan"] for row in rounds[1:]] == ["B", "A"]
    assert all(row["clients_asked"] == row["clients_used"] == 3 for row in rounds[1:])
    assert [(row["round"], row["client"]) for row in clients] == [
        (number, f"partition-{client:06d}") for number in (1, 2) for client in range(3)
    ]
    assert [row["steps"] for row in clients] == [2] * 3 + [4] * 3
    assert not any("unprotected" in key or "loss" in key for row in clients for key in row)


def test_no_file_holds_what_json_has_not(make_config: MakeConfig, tmp_path: Path) -> None:
    run_dir, summary = run(make_config(epsilon=float("inf"), num_rounds=1), tmp_path / "run")
    assert summary["epsilon_max"] == float("inf")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    for name in ("rounds.jsonl", "clients.jsonl", "summary.json"):
        text = (run_dir.path / name).read_text()
        for part in text.splitlines() if name.endswith("l") else [text]:
            json.loads(part, parse_constant=refuse)
    read = run_dir.summary()
    assert read is not None
    assert read["epsilon_max"] is None
    assert read["epsilon_budget"] is None


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


def test_progress_is_told_round_by_round(make_config: MakeConfig, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    run_dir, _ = run(make_config(epsilon=float("inf")), tmp_path / "run", on_round=rows.append)
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert [row["accuracy"] for row in rows] == [r["accuracy"] for r in run_dir.rows("rounds")]


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


def test_what_clients_call_their_numbers_does_not_change_what_the_server_counts(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """All clients measure under the names of a row's own columns; a run of FedSA writes them."""
    own = {"round": 77.0, "plan": 1.0, "failures": 2.0, "clients_used": 9.0, "seconds": -1.0}

    def respond(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if message.metadata.message_type in ("train", "evaluate"):
            reply.content.metric_records["metrics"].update(
                {name: v for name, v in own.items() if name != "seconds"}
            )
        return reply

    config = make_config(strategy="fedsa-lora", num_rounds=1)
    run_dir = RunDirectory(tmp_path / "run")
    with LocalGrid(respond, config.num_clients, config.items()).running() as grid:
        summary = run_federation(grid, config, run_dir)
    row = run_dir.rows("rounds")[1]
    assert (row["round"], row["plan"], row["clients_used"], row["failures"]) == (1, "*", 3, [])
    assert row["seconds"] > 0
    assert [entry["round"] for entry in run_dir.rows("clients")] == [1, 1, 1]
    assert summary["final_accuracy"] == row["accuracy"]


def test_a_run_in_which_no_client_measures_goes_on_without_figures(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    def respond(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "evaluate":
            raise RuntimeError("this device measures nothing")
        return app(message, context)

    config = make_config(strategy="fedsa-lora")
    run_dir = RunDirectory(tmp_path / "run")
    with LocalGrid(respond, config.num_clients, config.items()).running() as grid:
        summary = run_federation(grid, config, run_dir)
    assert (summary["status"], summary["rounds_done"]) == ("completed", 2)
    for row in run_dir.rows("rounds")[1:]:
        assert "accuracy" not in row
        assert row["clients_used"] == 3
        assert len(row["failures"]) == 3
        assert describe_round(row)


def test_a_picture_that_cannot_be_drawn_does_not_take_the_result_away(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("fedlora_flwr.plots.modes.plot_modes", fail)
    run_dir, summary = run(make_config(strategy="as-lora"), tmp_path / "run")
    assert summary["status"] == "completed"
    assert not (run_dir.path / "modes.png").exists()


def test_an_unknown_strategy_fails_before_training(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="did you mean 'rolora'"):
        run(make_config(strategy="roloro"), tmp_path / "run")
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


def test_unprotected_metrics_are_marked(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(num_rounds=1, report_unprotected_metrics=True)
    run_dir, summary = run(config, tmp_path / "run")
    assert summary["unprotected_metrics"] is True
    assert all("unprotected-accuracy" in row for row in run_dir.rows("clients"))


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
