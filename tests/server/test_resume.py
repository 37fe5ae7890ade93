"""A run that is killed and goes on is the run that was not, bit for bit."""

from __future__ import annotations

import random
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest

from fedlora_flwr.strategies import STRATEGIES
from tests.server.resuming import (
    Deadly,
    assert_same,
    begin,
    has_begun,
    killed,
    resume,
    rows,
    tiny,
)

SUM = {
    "trust_model": "secure-sum", "sample_rate": 0.25, "local_steps": 1, "strategy": "rolora",
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    **{name: {"strategy": name} for name in STRATEGIES},
    "flexlora": {"strategy": "flexlora", "client_ranks": "1,2,1"},
    "fedavgm": {"strategy": "fedavgm", "fedavgm.server-momentum": 0.9},
    "own heads, average": {"strategy": "ffa-lora", "filter": "doppler", "average_decay": 0.5},
    "heads that stay": {"strategy": "rolora", "share_head": False},
    "cohorts with a cap": {"num_clients": 5, "fraction_train": 0.5, "max_rounds": 2},
    "budget of a life": {"ledger_scope": "lifetime", "run_epsilon": 4.0},
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
