"""``fedlora plan`` says what the measured rows support, and how far a run follows it."""

from __future__ import annotations

import json
import math

import pytest
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.recipes import RECIPES, load_recipe, recipe_names
from fedlora_flwr.forecast import advice
from fedlora_flwr.forecast.advice import advise, nearest, table

OWN = [name for name in recipe_names() if "/" not in name]
MEASURED = [name for name in OWN if nearest(load_recipe(name).task, "local", 1.0)]
# Recipes beside which a comment says why they differ.
DIFFER = ("cifar10-small-swin",)


@pytest.mark.parametrize("name", MEASURED)
def test_a_recipe_follows_the_advice_or_says_why_not(name: str) -> None:
    found = advise(load_recipe(name))
    assert found.followed == (name not in DIFFER), found.text
    said = "fedlora plan advises" in (RECIPES / f"{name}.toml").read_text(encoding="utf-8")
    assert said == (name in DIFFER)


@pytest.mark.parametrize("name", MEASURED)
def test_a_run_with_the_advised_changes_follows_it(name: str) -> None:
    config = load_recipe(name)
    for epsilon in (
        0.3,
        0.5,
        1.0,
        2.0,
        3.0,
        8.0,
        20.0,
        *(() if config.secure_sum else (math.inf,)),
    ):
        given = {"epsilon": epsilon, "strategy": "la-lora"}
        before = advise(RunConfig.of(config.items(), given))
        assert not before.followed
        assert before.text.startswith("take -c strategy=")
        after = advise(RunConfig.of(config.items(), given, before.changes))
        assert after.followed
        assert after.text.startswith("this run follows it: ")
        assert after.measured == before.measured


def test_the_rates_are_advised_for_the_steps_that_they_were_tuned_for() -> None:
    digits = {"strategy": "dp-lora", "epsilon": 8.0, "lr-a": 0.1}
    same = advise(RunConfig.of(load_recipe("digits").items(), digits))
    assert {"strategy", "lr-a"} == same.changes.keys()
    others = advise(RunConfig.of(load_recipe("digits").items(), digits, {"local-steps": 1}))
    assert others.changes.keys() == {"strategy"}
    assert "rates for the steps of digits may not fit yours, so tune them" in others.text


@pytest.mark.parametrize(
    ("trust", "epsilon", "cell"),
    [
        ("local", 2.0, ("local", 3.0)),
        ("local", 100.0, ("local", 8.0)),
        ("local", math.inf, ("local", math.inf)),
        ("secure-sum", 20.0, ("secure-sum", 8.0)),
        ("secure-sum", math.inf, ("secure-sum", 8.0)),
    ],
)
def test_an_epsilon_that_was_not_measured_takes_the_nearest(
    trust: str, epsilon: float, cell: tuple[str, float]
) -> None:
    found = nearest("digits", trust, epsilon)
    assert found is not None
    assert (found.trust_model, found.epsilon) == cell


def test_what_is_carried_over_says_from_what(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = ("image-classification", "secure-sum")
    rows = [one for one in table() if (one.task, one.trust_model) != sums]
    monkeypatch.setattr(advice, "table", lambda: rows)
    pictures = advise(load_recipe("cifar10-swin-secure-sum"))
    assert (
        "carried over from local noise at ε = 1, since no secure sum was measured" in pictures.text
    )
    digits = advise(RunConfig.of(load_recipe("digits").items(), {"epsilon": 6.0}))
    assert "carried over from ε = 8, the nearest that was measured" in digits.text
    exact = advise(load_recipe("digits"))
    assert "carried over" not in exact.text
    assert exact.text.endswith("(docs/results.md#which-method-to-take)")


@pytest.mark.parametrize("task", ["instruction-tuning", "question-answering", "mine:Task"])
def test_a_task_without_rows_gets_no_advice(task: str) -> None:
    found = advise(RunConfig.of({"task": task}))
    assert found.measured is None
    assert not found.followed
    assert not found.changes
    assert f"no methods were compared on the task {task!r}" in found.text


def test_the_command_says_it_for_each_budget_and_in_json() -> None:
    run = ("plan", "digits", "--records", "200", "-c", "num-clients=3")
    shown = CliRunner().invoke(app, [*run, "--epsilon", "1,none"]).output
    lines = [line for line in shown.splitlines() if line.startswith("Advice")]
    assert [line.split(":")[0].split(maxsplit=1)[1] for line in lines] == [
        "at ε = 1", "without privacy",
    ]  # fmt: skip
    found = json.loads(CliRunner().invoke(app, [*run, "--epsilon", "8", "--json"]).output)
    (one,) = found["budgets"]
    assert one["advice"]["page"] == "docs/results.md#which-method-to-take"
    assert one["advice"]["row"] == "rolora"
    assert one["advice"]["followed"] is True
