from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from fedlora_flwr import follow_fit
from fedlora_flwr.errors import FedLoRAError, InvalidValue
from fedlora_flwr.integrations.planned_loop import PlannedRound

Arrays = dict[str, NDArray[Any]]
PREFIX = "base_model.model."
HEAD = {"head.weight", "head.bias"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        out: Tensor = self.head(x)
        return out


def names(*factors: str) -> set[str]:
    """Return the names of factors, e.g. ``"0A"``."""
    return {f"layers.{f[0]}.lora_{f[1]}.weight" for f in factors}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=r"layers\.\d+", modules_to_save=["head"])
    made: nn.Module = get_peft_model(Net(), config)
    return made


@pytest.fixture
def start(model: nn.Module) -> Arrays:
    """Return arrays by the names that PEFT's users send, B away from zero."""
    rng = np.random.default_rng(1)
    state = get_peft_model_state_dict(model)
    return {name: rng.normal(size=p.shape).astype(np.float32) for name, p in state.items()}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), weight_decay=0.1)


def begin(
    arrays: Mapping[str, NDArray[Any]],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    **config: Any,
) -> PlannedRound:
    return follow_fit(
        list(arrays.values()), {"array-names": ",".join(arrays), **config}, model, optimizer
    )


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, parts: int = 1, to_none: bool = True
) -> None:
    generator = torch.Generator().manual_seed(2)
    optimizer.zero_grad(set_to_none=to_none)
    for _ in range(parts):
        x = torch.randn(8, 4, generator=generator)
        nn.functional.cross_entropy(model(x), torch.arange(8) % 3).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    state = get_peft_model_state_dict(model)
    return {name.removeprefix(PREFIX): p.detach().clone() for name, p in state.items()}


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(("parts", "to_none"), [(1, True), (3, True), (1, False)])
def test_each_step_moves_what_is_planned_and_nothing_else(
    model: nn.Module, start: Arrays, parts: int, to_none: bool
) -> None:
    """Also with momentum, weight decay, accumulated gradients and gradients set to zero."""
    optimizer = adamw(model)
    begin(start, model, optimizer, plan="BA/AB/*")
    found = [values(model)]
    for _ in range(4):
        step(model, optimizer, parts, to_none)
        found.append(values(model))
    changes = [moved(*pair) - HEAD for pair in pairwise(found)]
    ba, ab = names("0B", "1A"), names("0A", "1B")
    assert changes == [ba, ab, ba | ab, ba]
    assert all(moved(*pair) >= HEAD for pair in pairwise(found))


def test_the_round_starts_from_the_servers_arrays(model: nn.Module, start: Arrays) -> None:
    begin(start, model, adamw(model), plan="B")
    for name, value in values(model).items():
        np.testing.assert_array_equal(value, start[PREFIX + name])


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize(
    ("plan", "steps", "factors"), [("B", 2, "B"), ("B/A", 1, "B"), ("*", 1, "AB")]
)
def test_what_trained_is_uploaded_by_the_servers_names(
    model: nn.Module, start: Arrays, prefix: str, plan: str, steps: int, factors: str
) -> None:
    sent = {prefix + name.removeprefix(PREFIX): array for name, array in start.items()}
    optimizer = adamw(model)
    planned = begin(sent, model, optimizer, plan=plan)
    for _ in range(steps):
        step(model, optimizer)
    arrays, examples, metrics = planned.fit_result(7, {"loss": 0.5})
    listed = str(metrics["array-names"]).split(",")
    expected = names(*(layer + factor for layer in "01" for factor in factors)) | HEAD
    assert set(listed) == {prefix + name for name in expected}
    assert (examples, metrics["loss"]) == (7, 0.5)
    now = values(model)
    for name, array in zip(listed, arrays, strict=True):
        np.testing.assert_array_equal(array, now[name.removeprefix(prefix)])
        assert array.dtype == np.float32


def test_without_a_plan_everything_trains_and_returns_in_the_servers_order(
    model: nn.Module, start: Arrays
) -> None:
    optimizer = adamw(model)
    planned = begin(start, model, optimizer)
    step(model, optimizer)
    assert list(planned.upload()) == list(start)
    assert moved({n.removeprefix(PREFIX): torch.tensor(a) for n, a in start.items()}, values(model))


def test_a_model_serves_round_after_round(model: nn.Module, start: Arrays) -> None:
    for plan, factor in (("B", "B"), ("A", "A")):
        optimizer = adamw(model)
        planned = begin(start, model, optimizer, plan=plan)
        step(model, optimizer)
        trained = {n.removeprefix(PREFIX) for n in planned.upload()}
        assert trained == names(f"0{factor}", f"1{factor}") | HEAD
        before = values(model)
        step(model, optimizer)  # A round that has ended plans nothing more.
        assert moved(before, values(model)) == names("0A", "0B", "1A", "1B") | HEAD


def renamed(arrays: Arrays, old: str, new: str) -> Arrays:
    return {name.replace(old, new): array for name, array in arrays.items()}


def without(arrays: Arrays, parts: Iterable[str]) -> Arrays:
    return {name: a for name, a in arrays.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("change", "config", "sentence"),
    [
        (lambda a: without(a, ["lora"]), {}, "expected LoRA factors with the names"),
        (
            lambda a: renamed(a, "layers.1", "layers.7"),
            {},
            "Expected an array of this model: one of",
        ),
        (lambda a: without(a, ["head"]), {}, "freeze it, or send it too"),
        (lambda a: {n: x[:1] for n, x in a.items()}, {}, r"shape of .* expected \(2, 4\)"),
        (
            dict,
            {"plan": "BAB"},
            "1 or 2 modes per step, for blocks .*layers.1.*; give follow_plan the strategy",
        ),
        (dict, {"plan": "A", "share": "A"}, "FedSALoRA needs LoRAClient"),
        (
            lambda a: {**a, "layers.0.folded_A.weight": np.zeros((1, 4))},
            {},
            "FLoRA, FedExLoRA and FFASeeds need LoRAClient",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    model: nn.Module, start: Arrays, change: Any, config: dict[str, str], sentence: str
) -> None:
    before = values(model)
    with pytest.raises(InvalidValue, match=sentence):
        begin(change(start), model, adamw(model), **config)
    assert not moved(before, values(model))


def test_an_optimizer_that_lacks_a_factor_is_refused(model: nn.Module, start: Arrays) -> None:
    only = [p for name, p in model.named_parameters() if "lora_A" in name]
    with pytest.raises(InvalidValue, match=r"one over all arrays; it lacks '.*lora_B\.weight'"):
        begin(start, model, torch.optim.SGD(only, lr=0.1), plan="A")


def test_a_loop_that_steps_another_optimizer_is_told(model: nn.Module, start: Arrays) -> None:
    planned = begin(start, model, adamw(model), plan="B")
    step(model, adamw(model))
    with pytest.raises(FedLoRAError, match="took no step in this round: give follow_plan"):
        planned.upload()


def test_a_server_that_names_no_arrays_is_refused(model: nn.Module, start: Arrays) -> None:
    with pytest.raises(InvalidValue, match="wrap the server's strategy in LegacyStrategy"):
        follow_fit(list(start.values()), {}, model, adamw(model))
