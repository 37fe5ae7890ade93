"""What methods declare, and that nobody tells methods apart by another way."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import fedlora_flwr
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.strategies import STRATEGIES, FedLoRA, between, choice, setting

PACKAGE = Path(fedlora_flwr.__file__).parent
CLASSES = {method.__name__ for method in STRATEGIES.values()}


def declared(attribute: str) -> set[str]:
    return {name for name, method in STRATEGIES.items() if getattr(method, attribute)}


def test_what_the_methods_of_the_package_declare() -> None:
    every = set(STRATEGIES)
    assert declared("folds") == {"flora", "fedex-lora", "ffa-seeds"}
    assert declared("stable_basis") == every - {"fedsvd", "flexlora", "ffa-seeds"}
    assert declared("personal") == {"fedsa-lora", "mr-mtl"}
    assert declared("own_models") == {"mr-mtl"}
    assert declared("own_ranks") == {"flexlora"}
    assert declared("needs_each_upload") == {"flora", "fedex-lora", "flexlora"}
    otherwise = {"flora", "fedex-lora", "flexlora", "fedsvd", "ffa-seeds"}
    assert declared("averages") == every - otherwise


def test_a_method_that_aggregates_otherwise_and_says_nothing_is_taken_to_need_all() -> None:
    class Median(FedLoRA):
        def aggregate(self, *args: Any) -> dict[str, Any]:
            return super().aggregate(*args)

    class Child(Median):
        pass

    for method in (Median, Child):
        assert not method.averages
        assert method.needs_each_upload
    assert FedLoRA.averages
    assert not FedLoRA.needs_each_upload


@dataclass(frozen=True)
class Settings:
    beta: float = setting(0.5, between(0, 1), "weight of the round before")
    kind: str = setting("mean", choice("mean", "median"), "what is taken")
    warm_up: int = setting(2, between(0, 9), "rounds before it begins")


class Own(FedLoRA):
    name: ClassVar[str] = "own"
    settings: ClassVar[type] = Settings
    beta: float
    kind: str
    warm_up: int


def test_settings_are_arguments_and_attributes() -> None:
    method = Own(beta=1, warm_up=np.int64(3), seed=4)
    assert (method.beta, method.kind, method.warm_up, method.seed) == (1.0, "mean", 3, 4)
    assert type(method.beta) is float


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beta": 1.5}, "beta = 1.5 cannot be used: expected a number from 0 to 1"),
        ({"beta": "x"}, "beta = 'x' cannot be used: expected a number"),
        ({"warm_up": 0.5}, "warm-up = 0.5 cannot be used: expected a whole number"),
        ({"kind": "medean"}, "did you mean 'median'"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        Own(**given)


def test_an_unknown_argument_is_named_with_the_nearest_setting() -> None:
    with pytest.raises(TypeError, match=r"Own got an unexpected keyword argument 'beat'.*'beta'"):
        Own(beat=0.5)
    with pytest.raises(TypeError, match="evaluate_metrics_aggr_fn"):
        FedLoRA(evaluate_metrics_aggr_fn=None)


def test_a_setting_never_takes_the_place_of_something_else() -> None:
    @dataclass(frozen=True)
    class Bad:
        seed: int = setting(1, between(0, 9), "another seed")

    class Method(FedLoRA):
        settings: ClassVar[type] = Bad

    with pytest.raises(TypeError, match="'seed'"):
        Method()


# Nobody compares names or classes.


def asked_otherwise(tree: ast.AST) -> list[int]:
    """Return the lines that compare with a strategy's name or class, or guess at an attribute."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            words = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
            names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            bad = bool(words & set(STRATEGIES) or names & CLASSES)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            arguments = {n.id for a in node.args for n in ast.walk(a) if isinstance(n, ast.Name)}
            first = ast.unparse(node.args[0]) if node.args else ""
            bad = node.func.id in ("isinstance", "issubclass") and bool(arguments & CLASSES)
            bad = bad or (node.func.id in ("getattr", "hasattr") and "strategy" in first)
        elif isinstance(node, ast.Dict | ast.Match):
            words = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
            bad = len(words & set(STRATEGIES)) > 1
        else:
            bad = False
        if bad:
            lines.append(getattr(node, "lineno", 0))
    return lines


def test_callers_ask_the_declaration() -> None:
    found = {}
    for file in PACKAGE.rglob("*.py"):
        # The registry is where names belong.
        if file != PACKAGE / "places.py":
            lines = asked_otherwise(ast.parse(file.read_text(encoding="utf-8")))
            if lines:
                found[str(file.relative_to(PACKAGE))] = lines
    assert found == {}


@pytest.mark.parametrize(
    "code",
    [
        "config.strategy == 'flora'",
        "name in ('flora', 'fedex-lora')",
        "isinstance(strategy, FLoRA)",
        "isinstance(strategy, (FLoRA, FlexLoRA))",
        "type(strategy) is FedSVD",
        "getattr(strategy, 'folds', False)",
        "reason = {'flora': 1, 'fedsvd': 2}",
    ],
)
def test_a_comparison_is_found(code: str) -> None:
    assert asked_otherwise(ast.parse(code))
