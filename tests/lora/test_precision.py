"""A backbone in bfloat16: what is lower, what stays full, and that a run learns with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora_flwr.data.records import TensorRecords
from fedlora_flwr.lora.precision import run_in_bf16
from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import prepare_run, run_in_process
from tests.conftest import MakeConfig
from tests.models import FAMILIES, SWIN, Family, active, joint_norm, loop_gradients, update


def full(records: TensorRecords) -> TensorRecords:
    batch = records.batch(torch.arange(len(records)))
    return TensorRecords({k: v.float() if v.is_floating_point() else v for k, v in batch.items()})


def half_engine(family: Family) -> PrivateEngine:
    adapted = family.adapted()
    adapted.model.float()
    run_in_bf16(adapted.model)
    return PrivateEngine(adapted, family.losses)


def dtypes(engine: PrivateEngine, batch: Mapping[str, Tensor], family: Family) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            seen[name] = getattr(output, "logits", output).dtype

        return hook

    model = engine.adapted.model
    hooks = [
        engine.adapted.layers[0].base.register_forward_hook(note("backbone")),
        model.register_forward_hook(note("model")),
    ]
    seen["losses"] = family.losses(model, batch).dtype
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_backbone_multiplies_in_bf16_and_losses_are_fp32(family: Family) -> None:
    engine, records = half_engine(family), full(family.records(3))
    engine._sampler.num_records = 3
    before = {p.dtype for p in engine.adapted.model.parameters()}

    found = dtypes(engine, records.batch(torch.arange(3)), family)

    assert found == {
        "backbone": torch.bfloat16,
        "model": torch.float32,
        "losses": torch.float32,
    }
    assert {p.dtype for p in engine.adapted.model.parameters()} == before == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_gradients_of_each_record_are_fp32_and_near_those_of_a_loop_in_fp64(
    family: Family,
) -> None:
    engine, records = half_engine(family), full(family.records(4))
    names = active(engine.adapted, "*")

    found = engine.gradients_by_record(records, torch.arange(4), names)

    expected = loop_gradients(family, family.plain(), family.records(4), range(4))
    assert {found[name].dtype for name in names} == {torch.float32}
    for record in range(4):
        gap = joint_norm(found[name][record] - expected[name][record] for name in names)
        assert 0 < gap < 0.05 * joint_norm(expected[name][record] for name in names)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_check_for_mixed_records_is_not_misled_by_rounding(family: Family) -> None:
    engine, seen = half_engine(family), set()

    def note(_module: Any, _inputs: Any, output: Tensor) -> None:
        seen.add(output.dtype)

    hook = engine.adapted.layers[0].base.register_forward_hook(note)
    engine.verify(full(family.records(2)))
    assert seen == {torch.float32}

    engine.gradients_by_record(
        full(family.records(2)), torch.arange(2), active(engine.adapted, "*")
    )
    hook.remove()
    assert seen == {torch.float32, torch.bfloat16}


def graph_of(tensor: Tensor) -> set[str]:
    """Return the names of all operations that a tensor's gradient goes through."""
    names, seen, todo = set(), set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            todo += [following for following, _ in node.next_functions]
    return names


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_is_fused_on_a_cpu_but_where_its_bf16_gradient_would_be_slow(
    precision: str,
) -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = torch.nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    model = Attention()
    if precision == "bf16":
        run_in_bf16(model)
    graph = graph_of(model(torch.randn(2, 3, 5, 8)))
    assert any("Flash" in name for name in graph) == (precision == "fp32")


def test_sums_of_clipped_gradients_keep_the_bound_in_bf16() -> None:
    engine, records = half_engine(SWIN), full(SWIN.records(4))
    mechanism = Mechanism(0.0, 0.1, 4, 4)

    moved = update(engine, records, [0, 1, 2], "*", mechanism)
    without = update(engine, records, [0, 1], "*", mechanism)

    change = joint_norm(moved[name] - without[name] for name in moved)
    assert 0.099 < change < 0.1 * (1 + 1e-4)


def test_a_run_in_bf16_learns_as_in_fp32_and_gives_other_bits(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    rows = {}
    for precision in ("fp32", "bf16"):
        config = make_config(
            precision=precision, num_rounds=4, local_steps=5, epsilon=float("inf"), lr_head=0.5
        )
        directory = RunDirectory(tmp_path / precision)
        run_in_process(prepare_run(config), directory, lambda _: None)
        rows[precision] = directory.rows("rounds")[-1]

    assert rows["fp32"]["accuracy"] > 0.7
    assert rows["bf16"]["accuracy"] == pytest.approx(rows["fp32"]["accuracy"], abs=0.03)
    assert rows["bf16"]["loss"] != rows["fp32"]["loss"]
