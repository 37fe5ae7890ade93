"""What a run writes: its summary, its rows, its pictures."""

from __future__ import annotations

import json
import logging
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

from fedlora_flwr.client_app import app
from fedlora_flwr.config import RunConfig
from fedlora_flwr.server.rounds import by_name, describe_round
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.server.serve import run_federation
from fedlora_flwr.simulations.local_grid import LocalGrid
from tests.conftest import MakeConfig
from tests.server.support import SUMMARY, run


def test_the_files_of_a_run(finished: tuple[RunConfig, RunDirectory]) -> None:
    files = {entry.name for entry in finished[1].path.iterdir()}
    results = {"config.toml", "rounds.jsonl", "clients.jsonl", "summary.json", "adapter"}
    results |= {"best", "checkpoints", "report.html"}
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


def test_progress_is_told_round_by_round(make_config: MakeConfig, tmp_path: Path) -> None:
    rows: list[Any] = []
    run_dir, _ = run(make_config(epsilon=float("inf")), tmp_path / "run", on_round=rows.append)
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert [row["accuracy"] for row in rows] == [r["accuracy"] for r in run_dir.rows("rounds")]


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
    for row in run_dir.rounds()[1:]:
        assert "accuracy" not in row
        assert row["clients_used"] == 3
        assert len(row["failures"]) == 3
        assert describe_round(row)


def test_a_run_writes_its_report(make_config: MakeConfig, tmp_path: Path) -> None:
    run_dir, _ = run(make_config(strategy="as-lora", num_rounds=2), tmp_path / "run")
    page = (run_dir.path / "report.html").read_text("utf-8")
    document = ET.fromstring(page.split("\n", 1)[1])
    parts = {one.get("id") for one in document.iter("section")}
    assert parts >= {"result", "privacy", "cost", "choices", "failures", "configuration"}
    measured = [row["accuracy"] for row in map(by_name, run_dir.rounds())]
    assert [f"{100 * value:.1f}".removesuffix(".0") in page for value in measured] == [True] * 3
    for client in {row["client"] for row in run_dir.rows("clients")}:
        assert f'<th scope="row">{client}</th>' in page


def test_a_run_that_fails_has_a_report_that_says_why(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    def stop(row: Any) -> None:
        if row["round"] == 1:
            raise RuntimeError("the <disk> is gone")

    with pytest.raises(RuntimeError):
        run(make_config(num_rounds=2), tmp_path / "run", on_round=stop)
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "status failed. RuntimeError: the &lt;disk&gt; is gone" in page


def test_a_report_that_cannot_be_written_does_not_take_the_result_away(
    make_config: MakeConfig, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def block(_: Any) -> None:
        (tmp_path / "run" / "report.html" / "in the way").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    run_dir, summary = run(make_config(num_rounds=1), tmp_path / "run", on_round=block)
    assert summary["status"] == "completed"
    assert run_dir.summary() is not None
    assert [r for r in caplog.records if "report.html could not be written" in r.getMessage()]


def test_unprotected_metrics_are_marked(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(num_rounds=1, report_unprotected_metrics=True)
    run_dir, summary = run(config, tmp_path / "run")
    assert summary["unprotected_metrics"] is True
    assert all("unprotected-accuracy" in row for row in run_dir.rows("clients"))


def test_unprotected_metrics_that_only_a_device_asks_for_are_marked(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config, run_dir = make_config(num_rounds=1), RunDirectory(tmp_path / "run")
    clients = {**config.items(), "report-unprotected-metrics": True}
    with LocalGrid(app, config.num_clients, clients).running() as grid:
        summary = run_federation(grid, config, run_dir)
    assert config.report_unprotected_metrics is False
    assert summary["unprotected_metrics"] is True
