"""A folder or a file may be given as text wherever the public names take one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import fedlora_flwr
from fedlora_flwr import Account, Ledger, LoRASpec, RunResult, Segment, attach, spent
from fedlora_flwr.errors import InvalidValue


def public_callables() -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in fedlora_flwr.__all__:
        found = getattr(fedlora_flwr, name)
        if inspect.isclass(found):
            for member, method in inspect.getmembers(found, inspect.isroutine):
                ours = str(getattr(method, "__module__", "")).startswith("fedlora_flwr")
                # What a function of this package returns is made by that function.
                made = member == "__init__" and is_dataclass(found)
                if ours and not made and (member == "__init__" or not member.startswith("_")):
                    yield f"{name}.{member}", method
        elif callable(found):
            yield name, found


def test_every_public_function_that_takes_a_path_takes_its_text() -> None:
    paths = {
        f"{name}({parameter.name})": str(parameter.annotation)
        for name, found in public_callables()
        for parameter in inspect.signature(found).parameters.values()
        if "Path" in str(parameter.annotation)
    }
    assert len(paths) > 20
    assert {place for place, kind in paths.items() if "str | Path" not in kind} == set()


def test_a_ledger_is_found_by_its_text(tmp_path: Path) -> None:
    file = str(tmp_path / "ledger.sqlite")
    assert not Ledger.exists(file)
    planned = Segment(noise_multiplier=1.0, sample_rate=0.1, steps=5)
    account = Account("hospital-7", "run-1", epsilon=8.0, delta=1e-3)
    Ledger(file).record(account, 1, planned, planned)
    assert [found.steps for found in spent(file, 1e-3)] == [5]
    other, witness = str(tmp_path / "other.sqlite"), str(tmp_path / "witness")
    Ledger(other, witness=witness).record(account, 1, planned, planned)
    assert Ledger.exists(tmp_path / "nothing", witness)
    with pytest.raises(InvalidValue, match="the folder of a run"):
        RunResult(str(tmp_path))  # type: ignore[arg-type]


def adapted() -> Any:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    return attach(net, LoRASpec(2, 4.0, 0.0, "0", ("2",)), seed=0)


def test_an_export_to_a_text_has_a_card_that_promises_nothing(tmp_path: Path) -> None:
    adapted().export(str(tmp_path / "adapter"))

    card = (tmp_path / "adapter" / "README.md").read_text("utf-8")
    assert "| rank | 2 |" in card
    assert "| trained in full | `2` |" in card
    assert "Without these, no privacy is promised." in card
    assert "More Information Needed" not in card  # as PEFT's own template has it


def test_a_card_says_the_promise_that_it_is_given(tmp_path: Path) -> None:
    adapted().export(tmp_path, "ε = 7.99 at δ = 0.001 for each record of each client.")

    card = (tmp_path / "README.md").read_text("utf-8")
    assert "## Privacy\n\nε = 7.99 at δ = 0.001 for each record of each client.\n" in card
    assert "no privacy is promised" not in card
