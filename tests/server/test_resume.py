"""A run that is killed and continues is the run that was not, bit for bit."""

from __future__ import annotations

import errno
import random
import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.files import FileTrouble, replace_file
from fedlora_flwr.places import FLOWERS
from fedlora_flwr.server import checkpoint
from fedlora_flwr.server.checkpoint import Checkpoints
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.server_app import folder_of
from fedlora_flwr.strategies import STRATEGIES
from tests.server.resuming import (
    Deadly,
    assert_same,
    begin,
    has_begun,
    killed,
    ledger,
    resume,
    rows,
    state,
    tiny,
)

SUM = {
    "trust_model": "secure-sum", "sample_rate": 0.25, "local_steps": 1, "strategy": "rolora",
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    **{name: {"strategy": name} for name in (*STRATEGIES, *FLOWERS)},
    "flexlora": {"strategy": "flexlora", "client_ranks": "1,2,1"},
    "fedavgm": {"strategy": "fedavgm", "fedavgm.server-momentum": 0.9},
    "server's yogi": {"strategy": "la-lora", "server_optimizer": "yogi", "server_lr": 0.05},
    "own heads, average": {"strategy": "ffa-lora", "filter": "doppler", "average_decay": 0.5},
    "heads that stay": {"strategy": "rolora", "share_head": False},
    "cohorts with a cap": {"num_clients": 5, "fraction_train": 0.5, "max_rounds": 2},
    "budget of a life": {"ledger_scope": "lifetime", "run_epsilon": 4.0},
    "early end": {"num_rounds": 6, "early_stopping_patience": 1, "lr_head": 1e-9, "lr_b": 1e-9},
    "no noise": {"epsilon": float("inf"), "lr_schedule": "cosine:0.1"},
    "sum, momentum": {**SUM, "momentum": 0.9, "filter": "ema"},
    "sum, adam": {**SUM, "optimizer": "adamw", "filter": "doppler"},
    "sum, torch's adam": {**SUM, "optimizer": "adamw-plain"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_at_any_write_goes_on_as_if_it_had_not_been(name: str, tmp_path: Path) -> None:
    config, whole, broken = tiny(tmp_path, **RUNS[name]), tmp_path / "whole", tmp_path / "broken"
    counted = Deadly()
    begin(config, whole, counted)
    draw, kills = random.Random(zlib.crc32(name.encode())), 0
    while kills < 2:
        if not has_begun(broken):
            shutil.rmtree(broken, ignore_errors=True)
            kills += killed(begin, config, broken, draw.randrange(40, counted.seen))
        else:
            kills += killed(resume, config, broken, draw.randrange(1, counted.seen // 2))
    resume(config, broken)
    assert_same(whole, broken)


def test_a_run_that_is_resumed_after_its_last_round_says_what_it_said(tmp_path: Path) -> None:
    config, whole, again = tiny(tmp_path, **SUM), tmp_path / "whole", tmp_path / "again"
    begin(config, whole)
    begin(config, again)
    (again / "summary.json").unlink()
    resume(config, again)
    assert_same(whole, again)
    summary = RunDirectory(again).summary()
    assert summary is not None
    assert summary["remarks"]["secure sum"].startswith("simulated")


def test_each_write_of_a_round_may_be_the_last_of_its_process(tmp_path: Path) -> None:
    config = tiny(tmp_path, strategy="fedsa-lora", num_rounds=2, num_clients=2)
    whole, broken, kills = tmp_path / "whole", tmp_path / "broken", 0
    begin(config, whole)
    while killed(begin, config, broken, 60) and not has_begun(broken):
        raise AssertionError("The first checkpoint comes earlier.")
    while killed(resume, config, broken, 2 * kills + 1):
        kills += 1
    assert kills > 20
    assert_same(whole, broken)


def test_a_run_that_ended_before_its_first_checkpoint_begins_again_in_its_folder(
    tmp_path: Path,
) -> None:
    config, whole, broken = tiny(tmp_path), tmp_path / "whole", tmp_path / "broken"
    begin(config, whole)
    again = replace(config, resume=str(broken), run_dir=str(broken))
    assert not folder_of(again).resume  # It is not there yet.
    writes = iter(range(10, 100))
    while not (broken / "rounds.jsonl").exists():  # With the row of round 0, and nothing more.
        shutil.rmtree(broken, ignore_errors=True)
        assert killed(begin, config, broken, next(writes))
    assert not has_begun(broken)
    assert folder_of(again).resume
    with pytest.raises(InvalidValue, match="a run with a checkpoint"):
        resume(config, broken)  # Its name alone asks for what the run has done.
    begin(again, broken)
    assert_same(whole, broken)
    # Rounds whose checkpoints were lost are not forgotten.
    shutil.rmtree(broken / "checkpoints")
    with pytest.raises(InvalidValue, match="a run with a checkpoint"):
        begin(again, broken)


def test_a_damaged_checkpoint_costs_a_round_and_nothing_else(tmp_path: Path) -> None:
    config, whole, broken = tiny(tmp_path), tmp_path / "whole", tmp_path / "broken"
    begin(config, whole)
    shutil.copytree(whole, broken)
    last = broken / "checkpoints" / "round-0000003"
    last.write_bytes(last.read_bytes()[:-1])
    _, damaged = Checkpoints(broken).last()
    assert damaged == [
        f"{last} cannot be used (its content has changed since it was written). The checkpoint "
        "before it is used instead."
    ]
    resume(config, broken)
    assert_same(whole, broken)


def test_a_finished_run_goes_on_with_more_rounds(tmp_path: Path) -> None:
    config = tiny(tmp_path, epsilon=float("inf"), strategy="fedavgm")
    begin(config, tmp_path / "whole")
    summary = begin(replace(config, num_rounds=2), tmp_path / "run")
    assert (summary["end"], summary["rounds_done"]) == ("all rounds are done", 2)
    assert resume(config, tmp_path / "run")["rounds_done"] == 3
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_fresh_noise_is_counted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a cap of three rounds, a client has paid for one of them twice."""
    config = tiny(tmp_path, reproducible=False, num_rounds=4, max_rounds=3, min_completion=0.0)
    run = tmp_path / "run"
    save = checkpoint.Checkpoints.save
    monkeypatch.setattr(checkpoint.Checkpoints, "save", _interrupting(save))
    with pytest.raises(KeyboardInterrupt):
        begin(config, run)
    monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
    assert [row[1] for row in ledger(run)] == [1, 2] * 3
    resume(config, run)
    assert [row[1] for row in ledger(run)] == [1, 2, 2] * 3  # In three rows the plan ends.
    spent = rows(run, "rounds")
    assert [row["clients_used"] for row in spent[1:]] == [3, 3, 0]
    assert spent[2]["epsilon_max"] <= config.epsilon


def test_two_processes_that_continue_one_run_draw_other_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path, reproducible=False)
    first, second = tmp_path / "first", tmp_path / "second"
    save = checkpoint.Checkpoints.save
    monkeypatch.setattr(checkpoint.Checkpoints, "save", _interrupting(save))
    with pytest.raises(KeyboardInterrupt):
        begin(config, first)
    monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
    shutil.copytree(first, second)
    assert state(first) == state(second)
    for run in (first, second):
        resume(config, run)
    assert state(first) != state(second)


def _interrupting(save: Any) -> Any:
    def until_the_second(self: Checkpoints, made: Any) -> None:
        if made.round == 2:
            raise KeyboardInterrupt
        save(self, made)

    return until_the_second


def test_a_full_disk_ends_the_run_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, whole, run = tiny(tmp_path), tmp_path / "whole", tmp_path / "run"
    begin(config, whole)
    write = replace_file

    def full(path: Path, content: bytes) -> None:
        if path.name == "round-0000002":
            raise FileTrouble.of(OSError(errno.ENOSPC, "No space left on device"), path)
        write(path, content)

    monkeypatch.setattr("fedlora_flwr.server.checkpoint.replace_file", full)
    with pytest.raises(
        FileTrouble, match=r"round-0000002 cannot be used: No space left.*Make room"
    ):
        begin(config, run)
    assert Checkpoints(run).last()[0].round == 1
    monkeypatch.setattr("fedlora_flwr.server.checkpoint.replace_file", write)
    resume(config, run)
    assert_same(whole, run)


def test_a_run_that_a_process_is_at_work_on_is_left_alone(tmp_path: Path) -> None:
    config, run = tiny(tmp_path), tmp_path / "run"
    begin(config, run)
    with (
        RunDirectory(run, resume=True).working(),
        pytest.raises(InvalidValue, match="a run that no other process is working on"),
    ):
        resume(config, run)


def test_rows_that_were_changed_are_named(tmp_path: Path) -> None:
    config, run = tiny(tmp_path), tmp_path / "run"
    begin(config, run)
    (run / "rounds.jsonl").write_text("")
    with pytest.raises(InvalidValue, match=r"rounds\.jsonl.*Restore it, or begin a new run"):
        resume(config, run)
