"""A project with a ServerApp of its own is told of keys that nothing in it reads."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fedlora_flwr
from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.keys import fields_by_key
from fedlora_flwr.config.own_project import PACKAGE_SERVER, check_own_project
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.server.strategy import strategy_of
from fedlora_flwr.strategies import FFALoRA, RoLoRA
from fedlora_flwr.tasks.registry import build_task

OTHERS = {
    "resume": "/a/run",
    "start": "/an/adapter",
    "lora-init": "olora",
    "average-decay": 0.5,
    "eval-every": 2,
    "early-stopping-patience": 1,
    "early-stopping-threshold": 0.1,
    "metric-for-best-model": "accuracy",
    "trackers": "tensorboard",
}
# What a project has in its own hands, as docs/how_to/use_in_my_flower_project.md says.
IN_THE_PROJECTS_HANDS = {"task", "num-clients", "round-timeout", "run-dir", "client-ranks"}
# `strategy_of` uses or refuses the first three, and `state_folder` reads the last one.
READ_BY_A_PUBLIC_FUNCTION = {"largest-noise", "share-head", "trust-model", "state-dir"}
PACKAGES_OWN = {"server_app.py", "client_app.py", "server", "simulations", "studies", "cli"}
BESIDE_RUNS = {"audit", "report", "forecast", "trained", "deploy", "config", "plots"}


@pytest.mark.parametrize("key", PACKAGE_SERVER)
def test_a_key_of_the_packages_server_is_refused_with_what_to_do(key: str) -> None:
    more = {"early-stopping-patience": 1} if key == "early-stopping-threshold" else {}
    config = RunConfig.of({**more, key: OTHERS[key]})

    with pytest.raises(InvalidValue, match="only this package's own ServerApp does") as caught:
        check_own_project(config)

    assert caught.value.key in {key, *more}


def test_it_is_refused_where_a_project_makes_its_trainer_or_its_strategy() -> None:
    config = RunConfig(task="digits", resume="/a/run")

    with pytest.raises(InvalidValue, match="spend the budget once more"):
        LocalTrainer.build(config, build_task("digits", config))
    with pytest.raises(InvalidValue, match="spend the budget once more"):
        strategy_of(config)


def test_every_key_that_only_the_packages_own_apps_read_is_refused_or_in_the_projects_hands() -> (
    None
):
    """A new key of the server cannot be ignored in silence."""
    root, readers = Path(fedlora_flwr.__file__).parent, dict[str, set[str]]()
    for path in root.rglob("*.py"):
        room = path.relative_to(root).parts[0]
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and path.name != "strategy.py":
                readers.setdefault(node.attr, set()).add(room)
    alone = {
        key
        for key, entry in fields_by_key(RunConfig).items()
        if (rooms := readers.get(entry.name, set()) - BESIDE_RUNS) and rooms <= PACKAGES_OWN
    }
    assert alone - set(PACKAGE_SERVER) - IN_THE_PROJECTS_HANDS == READ_BY_A_PUBLIC_FUNCTION


def test_a_strategy_is_made_with_all_that_the_configuration_says() -> None:
    made = strategy_of(
        RunConfig.of(
            {"strategy": "ffa-lora", "fraction-train": 0.5, "min-clients": 7, "local-steps": 9,
             "robust": "median", "seed": 3}
        )
    )  # fmt: skip

    assert type(made) is FFALoRA
    assert (made.fraction_train, made.min_available_nodes, made.local_steps) == (0.5, 7, 9)
    assert (made.robust.rule, made.seed) == ("median", 3)
    assert type(strategy_of(RunConfig())) is RoLoRA


def test_a_secure_sum_is_refused_where_nothing_would_open_it() -> None:
    with pytest.raises(InvalidValue, match="only this package's own ServerApp opens sums"):
        strategy_of(RunConfig(trust_model="secure-sum", sample_rate=0.1, local_steps=1))
