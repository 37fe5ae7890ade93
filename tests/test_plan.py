from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import Layout, factor_of, folded_names
from fedlora_flwr.plan import MODES, ComponentPlan

VIT = [
    f"blocks.{block}.attn.{layer}.lora_{factor}.weight"
    for block in range(3)
    for layer in ("qkv", "proj")
    for factor in "AB"
]
HEAD = ["head.weight", "head.bias"]


@st.composite
def plans(draw: st.DrawFn) -> tuple[ComponentPlan, int]:
    """A plan, and the number of blocks that it is made for."""
    blocks = draw(st.integers(1, 5))
    mode = st.sampled_from(MODES)
    step = st.one_of(mode, st.lists(mode, min_size=blocks, max_size=blocks).map("".join))
    return ComponentPlan(tuple(draw(st.lists(step, min_size=1, max_size=6)))), blocks


@given(plans())
def test_the_wire_string_is_read_back(made: tuple[ComponentPlan, int]) -> None:
    plan, blocks = made
    assert ComponentPlan.parse(str(plan)) == plan
    plan.check(blocks)


@given(plans(), st.integers(1, 40))
def test_steps_cycle(made: tuple[ComponentPlan, int], step: int) -> None:
    plan, blocks = made
    for block in range(blocks):
        assert plan.factors(step, block) == plan.factors(step + len(plan.steps), block)


def test_odd_steps_and_even_steps() -> None:
    plan = ComponentPlan.parse("B/A")
    assert [plan.factors(step, 0) for step in range(1, 6)] == ["B", "A", "B", "A", "B"]


def test_each_block_has_its_mode() -> None:
    plan = ComponentPlan.parse("BA*-/A/-")
    assert [plan.factors(1, block) for block in range(4)] == ["B", "A", "AB", ""]
    assert [plan.factors(2, block) for block in range(4)] == ["A"] * 4
    assert [plan.factors(3, block) for block in range(4)] == [""] * 4


@pytest.mark.parametrize("text", ["", "/", "B/", "C", "b", "B A", "BA/BAB", "B//A", "B,A"])
def test_bad_wire_strings_are_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidValue, match="plan") as caught:
        ComponentPlan.parse(text)
    assert caught.value.value == text


def test_no_step_is_no_plan() -> None:
    with pytest.raises(InvalidValue, match="plan"):
        ComponentPlan(())


def test_a_plan_for_another_number_of_blocks_is_refused() -> None:
    plan = ComponentPlan.parse("B/BAB")
    plan.check(3)
    with pytest.raises(InvalidValue, match="1 or 4 modes"):
        plan.check(4)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("blocks.11.attn.qkv.lora_A.weight", "blocks.11"),
        ("layers.0.blocks.1.attn.qkv.lora_B.weight", "layers.0.blocks.1"),
        ("layers.2.downsample.reduction.lora_A.weight", "layers.2"),
        ("roberta.encoder.layer.5.attention.self.query.lora_A.weight", "roberta.encoder.layer.5"),
        ("bert.encoder.layer.0.output.dense.lora_B.weight", "bert.encoder.layer.0"),
        ("model.layers.3.self_attn.q_proj.lora_A.weight", "model.layers.3"),
        ("model.layers.1.blocks.12.mlp.fc1.lora_B.weight", "model.layers.1.blocks.12"),
        ("blocks.3.mlp.0.fc.lora_A.weight", "blocks.3"),
        ("transformer.h.2.attn.c_attn.lora_A.weight", "transformer.h.2"),
        ("fc.lora_B.weight", "fc"),
        ("stages.2.mlp.lora_B.weight", "stages.2.mlp"),
    ],
)
def test_blocks_by_name(name: str, block: str) -> None:
    assert Layout.of([name]).blocks == (block,)


def test_blocks_by_a_pattern_of_ones_own() -> None:
    names = [f"stages.{i}.{part}.lora_B.weight" for i in range(2) for part in ("fc1", "fc2")]
    layout = Layout.of(names, r"stages\.\d+")
    assert layout.blocks == ("stages.0", "stages.1")
    layout.check_blocks()
    plan = ComponentPlan.parse("BA")
    assert layout.active(plan, step=1) == (
        "stages.0.fc1.lora_B.weight",
        "stages.0.fc2.lora_B.weight",
    )


def test_a_layer_outside_any_block_is_refused_with_the_way_to_name_it() -> None:
    layout = Layout.of(["blocks.0.qkv.lora_B.weight", "stem.fc.lora_B.weight"])
    with pytest.raises(InvalidValue, match=r"'stem.fc'.*Set blocks to a regular expression"):
        layout.check_blocks()


def test_a_broken_pattern_is_refused() -> None:
    with pytest.raises(InvalidValue, match=r"blocks = '\('"):
        Layout.of(VIT, "(")


def test_folded_arrays_are_no_part_of_the_layout() -> None:
    layout = Layout.of([*VIT, *folded_names("blocks.0.attn.qkv"), *HEAD])
    assert layout.names == (*VIT, *HEAD)


def test_pairs_by_layer() -> None:
    layout = Layout.of([*VIT, *HEAD])
    layer = layout.layers[0]
    assert layout.pair(layer) == (f"{layer}.lora_B.weight", f"{layer}.lora_A.weight")
    with pytest.raises(InvalidValue, match="is missing"):
        Layout.of(["fc.lora_B.weight"]).pair("fc")


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("blocks.0.qkv.lora_A.weight", "A"),
        ("blocks.0.qkv.lora_B.weight", "B"),
        ("head.weight", None),
        ("blocks.0.lora_A.weight.extra", None),
        ("lora_A.weight", None),
        ("blocks.0.xlora_A.weight", None),
    ],
)
def test_factors_by_name(name: str, factor: str | None) -> None:
    assert factor_of(name) == factor


def test_swin_has_a_block_a_stage_and_depth() -> None:
    names = [
        f"layers.{stage}.blocks.{depth}.attn.qkv.lora_{factor}.weight"
        for stage in range(2)
        for depth in range(2)
        for factor in "AB"
    ]
    assert Layout.of(names).blocks == (
        "layers.0.blocks.0",
        "layers.0.blocks.1",
        "layers.1.blocks.0",
        "layers.1.blocks.1",
    )


def test_the_head_is_no_block() -> None:
    assert Layout.of([*VIT, *HEAD]).blocks == ("blocks.0", "blocks.1", "blocks.2")
    assert Layout.of([*VIT, "head.0.weight"]).blocks == ("blocks.0", "blocks.1", "blocks.2")


@pytest.mark.parametrize(("text", "factors"), [("A", "A"), ("B", "B"), ("*", "AB")])
def test_one_mode_for_all_blocks(text: str, factors: str) -> None:
    layout = Layout.of([*VIT, *HEAD])
    expected = tuple([n for n in VIT if factor_of(n) in [*factors]] + HEAD)
    assert layout.active(ComponentPlan.parse(text), step=1) == expected
    assert layout.trained(ComponentPlan.parse(text), num_steps=7) == expected


def test_modes_apply_to_whole_blocks() -> None:
    layout = Layout.of([*VIT, *HEAD])
    active = layout.active(ComponentPlan.parse("AB*"), step=1)
    assert active == (
        "blocks.0.attn.qkv.lora_A.weight",
        "blocks.0.attn.proj.lora_A.weight",
        "blocks.1.attn.qkv.lora_B.weight",
        "blocks.1.attn.proj.lora_B.weight",
        "blocks.2.attn.qkv.lora_A.weight",
        "blocks.2.attn.qkv.lora_B.weight",
        "blocks.2.attn.proj.lora_A.weight",
        "blocks.2.attn.proj.lora_B.weight",
        *HEAD,
    )


def test_alternation_with_one_step_trains_b_alone() -> None:
    layout, plan = Layout.of([*VIT, *HEAD]), ComponentPlan.parse("B/A")
    assert layout.trained(plan, num_steps=1) == layout.active(plan, step=1)
    assert not any(factor_of(name) == "A" for name in layout.trained(plan, num_steps=1))
    assert layout.trained(plan, num_steps=2) == (*VIT, *HEAD)


@given(plans(), st.integers(1, 9))
def test_trained_is_the_union_of_active(made: tuple[ComponentPlan, int], steps: int) -> None:
    plan, blocks = made
    names = [f"b.{i}.x.lora_{f}.weight" for i in range(blocks) for f in "AB"] + HEAD
    layout = Layout.of(names)
    active = [set(layout.active(plan, step)) for step in range(1, steps + 1)]
    assert set(layout.trained(plan, steps)) == set.union(*active)
    assert all(set(HEAD) <= entry for entry in active)


@pytest.mark.parametrize("names", [[], HEAD, ["blocks.0.attn.qkv.weight"]])
def test_arrays_without_lora_factors_are_refused(names: list[str]) -> None:
    with pytest.raises(InvalidValue, match="array names"):
        Layout.of(names)
