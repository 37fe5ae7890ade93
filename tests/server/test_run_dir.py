from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fedlora_flwr.config import RunConfig, read_toml
from fedlora_flwr.environment import versions
from fedlora_flwr.server.run_dir import RunDirectory


def test_a_new_folder_for_every_run_and_latest_points_to_the_newest(tmp_path: Path) -> None:
    parent = tmp_path / "runs"
    made = [RunDirectory.new(parent, RunConfig()) for _ in range(3)]
    assert len({run.path for run in made}) == 3
    assert all(run.path.name[15:].startswith("-digits-rolora") for run in made)
    assert (parent / "latest").is_symlink()
    assert (parent / "latest").resolve() == made[-1].path.resolve()
    assert sorted(p.name for p in parent.iterdir()) == sorted(
        ["latest", *(run.path.name for run in made)]
    )


def test_latest_still_works_where_the_folder_is_moved(tmp_path: Path) -> None:
    run = RunDirectory.new(tmp_path / "runs", RunConfig())
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "latest").resolve().name == run.path.name


def test_a_written_configuration_repeats_the_run(tmp_path: Path) -> None:
    config = RunConfig.of({"epsilon": math.inf, "strategy": "ffa-lora", "seed": 9})
    path = RunDirectory(tmp_path / "run").write_config(config)
    assert path == tmp_path / "run" / "config.toml"
    assert RunConfig.of(read_toml(path)) == config


def test_rows_are_read_back(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.rows("rounds") == []
    rows = [{"round": 0, "plan": "B", "failures": ["ε: no"]}, {"round": 1, "nested": {"a": [1.5]}}]
    for row in rows:
        run.append("rounds", row)
    assert run.rows("rounds") == rows
    assert run.rows("clients") == []


def test_a_row_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.append("rounds", {"round": 0})
    with (tmp_path / "rounds.jsonl").open("a") as stream:
        stream.write('{"round": 1, "acc')
    assert run.rows("rounds") == [{"round": 0}]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_json_has_no_infinity(tmp_path: Path, value: float) -> None:
    run = RunDirectory(tmp_path)
    row = {"epsilon": value, "list": [1.0, value], "nested": {"x": (value,)}}
    run.append("rounds", row)
    run.write_summary(row)
    expected = {"epsilon": None, "list": [1.0, None], "nested": {"x": [None]}}
    assert run.rows("rounds") == [expected]
    assert run.summary() == expected
    for name in ("rounds.jsonl", "summary.json"):
        text = (tmp_path / name).read_text()
        assert "Infinity" not in text
        assert "NaN" not in text


def test_a_summary_is_replaced_in_one_piece(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.summary() is None
    run.write_summary({"status": "failed"})
    with pytest.raises(TypeError):
        run.write_summary({"status": "completed", "bad": object()})
    assert run.summary() == {"status": "failed"}
    assert json.loads((tmp_path / "summary.json").read_text()) == {"status": "failed"}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_versions_name_what_results_depend_on() -> None:
    assert {"python", "fedlora-flwr", "flwr", "torch", "peft", "opacus"} <= set(versions())


def test_a_runs_folder_is_its_owners_alone(tmp_path: Path) -> None:
    before = tmp_path.stat().st_mode
    made = RunDirectory.new(tmp_path / "runs", RunConfig())
    named = RunDirectory(tmp_path / "named" / "deep")
    for folder in (made.path, made.path.parent, named.path, named.path.parent):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert tmp_path.stat().st_mode == before
