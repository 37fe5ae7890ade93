from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from fedlora_flwr import FedExLoRA, FedLoRA, FedSALoRA, FedSVD, FFALoRA, FlexLoRA, FLoRA
from fedlora_flwr.errors import FederationAborted
from tests.examples.projects import (
    ALL_A,
    ALL_B,
    accuracies,
    assert_learned_by_rolora,
    copy_of,
    flwr_run,
    local_run,
    module,
    moved,
    rounds,
)


@pytest.mark.flower
def test_flwr_run_trains_the_factor_that_rolora_plans(tmp_path: Path) -> None:
    app = copy_of("message_api", tmp_path)
    log = flwr_run(app, {"output": tmp_path})
    assert_learned_by_rolora(tmp_path, log)


def test_la_lora_takes_turns_within_a_round(tmp_path: Path) -> None:
    app = copy_of("message_api", tmp_path)
    local_run(app, "digits_lora", {"strategy": "la-lora", "output": tmp_path})
    start, first, *_ = rounds(tmp_path)
    assert moved(start, first) == ALL_A | ALL_B | {"head"}


def test_one_step_of_la_lora_trains_b(tmp_path: Path) -> None:
    app = copy_of("message_api", tmp_path)
    settings: dict[str, object] = {"strategy": "la-lora", "local-steps": 1, "num-rounds": 1}
    local_run(app, "digits_lora", {**settings, "output": tmp_path})
    start, first = rounds(tmp_path, 1)
    assert moved(start, first) == ALL_B | {"head"}


def test_as_lora_chooses_by_block_from_the_loops_own_updates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app = copy_of("message_api", tmp_path)
    settings: dict[str, object] = {"strategy": "as-lora", "num-rounds": 6, "output": tmp_path}
    local_run(app, "digits_lora", settings)
    found = rounds(tmp_path, 6)
    changes = [moved(*pair) - {"head"} for pair in pairwise(found)]
    # Exactly one factor a block, and not the same factor in all blocks of all rounds.
    assert all(sorted(name[0] for name in change) == ["0", "1", "2"] for change in changes)
    assert any(change not in (ALL_A, ALL_B) for change in changes)
    accuracy = accuracies(capsys.readouterr().out)
    assert accuracy[-1] > accuracy[0] + 0.3


@pytest.mark.parametrize("strategy", [FedLoRA, FFALoRA, FedSVD, FlexLoRA])
def test_other_strategies_take_the_same_line(strategy: type[FedLoRA], tmp_path: Path) -> None:
    app = copy_of("message_api", tmp_path)
    server = module(app, "digits_lora", "server_app")
    server.STRATEGIES["other"] = strategy
    local_run(app, "digits_lora", {"strategy": "other", "output": tmp_path})
    start, first, *_ = rounds(tmp_path)
    assert moved(start, first) >= ALL_B | {"head"}


@pytest.mark.parametrize(
    ("strategy", "sentence"),
    [
        (FLoRA, "FLoRA, FedExLoRA and FFASeeds need LoRAClient"),
        (FedExLoRA, "FLoRA, FedExLoRA and FFASeeds need LoRAClient"),
        (FedSALoRA, "FedSALoRA needs LoRAClient"),
    ],
)
def test_strategies_that_need_more_than_a_loop_say_so(
    strategy: type[FedLoRA], sentence: str, tmp_path: Path
) -> None:
    app = copy_of("message_api", tmp_path)
    module(app, "digits_lora", "server_app").STRATEGIES["other"] = strategy
    with pytest.raises(FederationAborted, match=sentence):
        local_run(app, "digits_lora", {"strategy": "other", "output": tmp_path})
