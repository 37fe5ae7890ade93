"""A break: a fault put into the package on purpose, and the one test that has to notice it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora_flwr.privacy.clipping import NoisyOptimizer

Fault = Callable[[pytest.MonkeyPatch], None]

OURS = ("fedlora_flwr.", "tests.")


@dataclass(frozen=True)
class Break:
    """One fault.

    Parameters
    ----------
    name : str
        Its name, that of its function.
    fault : str
        What is wrong then, in one sentence.
    test : str
        Id of the test that fails, by a failed assertion.
    apply : callable
        Puts the fault into the running package.
    """

    name: str
    fault: str
    test: str
    apply: Fault


BREAKS: list[Break] = []
"""All breaks, in the order of their definition."""


def caught_by(file: str, test: str) -> Callable[[Fault], Fault]:
    """Register a function as a break, with its docstring as the sentence.

    Parameters
    ----------
    file, test : str
        The test's file, from the root, and its name, with its parameters if it has any.
    """

    def register(apply: Fault) -> Fault:
        fault = inspect.getdoc(apply) or ""
        BREAKS.append(Break(apply.__name__, fault, f"{file}::{test}", apply))
        return apply

    return register


def everywhere(patch: pytest.MonkeyPatch, original: Any, broken: Any) -> None:
    """Replace a function under each name by which a loaded module of ours has imported it."""
    places = [
        (module, name)
        for title, module in list(sys.modules.items())
        if title.startswith(OURS) and not title.startswith("tests.breaks")
        for name, value in list(vars(module).items())
        if value is original
    ]
    assert places, original
    for module, name in places:
        patch.setattr(module, name, broken)


def by_tensor(made: NoisyOptimizer, columns: Tensor) -> list[Tensor]:
    """Cut rows, or a sum of rows, into the columns of each tensor."""
    return list(torch.split(columns, [p.numel() for p in made.params], dim=-1))
