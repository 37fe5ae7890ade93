from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from fedlora_flwr.errors import InvalidValue, PrivacyViolation
from fedlora_flwr.lora.adapters import AdaptedModel, LoRASpec, attach
from fedlora_flwr.lora.digests import in_bytes
from fedlora_flwr.privacy.engine import PrivateEngine
from tests.models import FAMILIES, ROBERTA, SWIN, VIT, Family

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


class Small(nn.Module):
    """Layers of several kinds; never run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.table = nn.Embedding(10, 4)
        self.norm = nn.LayerNorm(4)
        self.first = nn.Linear(4, 4)
        self.last = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def wrap(**changes: Any) -> PeftModel:
    return get_peft_model(Small(), LoraConfig(**{"target_modules": "first", "r": 2, **changes}))


def seed_of(family: Family, seed: int) -> AdaptedModel:
    return attach(family.model().float(), family.spec(), seed)


NAMES = {
    "vit": ("blocks.0.attn.qkv.lora_A.weight", "blocks.0.attn.qkv.lora_B.weight", "head.bias"),
    "swin": (
        "layers.0.blocks.0.attn.qkv.lora_A.weight",
        "layers.0.blocks.0.attn.qkv.lora_B.weight",
        "head.fc.bias",
    ),
    "roberta": (
        "roberta.encoder.layer.0.attention.self.query.lora_A.weight",
        "roberta.encoder.layer.0.attention.self.query.lora_B.weight",
        "classifier.out_proj.bias",
    ),
    "llama": (
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_B.weight",
        "model.layers.1.mlp.down_proj.lora_B.weight",
    ),
}


@every_family
def test_names_are_those_of_the_backbones_modules(family: Family) -> None:
    adapted = family.adapted()
    names = adapted.layout.names
    modules = {name for name, _ in family.model().named_modules()}

    assert (*names[:2], names[-1]) == NAMES[family.name]
    assert {
        name.split(".lora_")[0].removesuffix(".weight").removesuffix(".bias") for name in names
    } <= (modules)
    assert {id(p) for p in adapted.parameters.values()} == {
        id(p) for p in adapted.model.parameters() if p.requires_grad
    }
    PrivateEngine(adapted, family.losses)
    assert family.adapted().layout.names == names == tuple(adapted.read())


def test_layers_describe_y_equals_w0_x_plus_s_b_a_x() -> None:
    adapted = VIT.adapted()
    layer = adapted.layers[0]
    x = torch.randn(2, 8, dtype=torch.float64)

    expected = layer.base(x) + layer.scaling * (x @ layer.A.T @ layer.B.T)

    torch.testing.assert_close(layer.module(x), expected, rtol=1e-12, atol=1e-12)
    assert (layer.scaling, layer.A.shape, layer.B.shape) == (2.0, (3, 8), (24, 3))
    assert layer.enabled
    with adapted.model.disable_adapter():
        assert not layer.enabled


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 2.0), (True, 4.0)])
def test_rank_stabilized_scaling_divides_by_the_root_of_the_rank(
    rslora: bool, scaling: float
) -> None:
    adapted = attach(Small(), LoRASpec(4, 8.0, 0.0, "first", rslora=rslora), seed=0)

    assert adapted.layers[0].scaling == scaling


@every_family
def test_the_seed_alone_decides_a_and_b_is_zero(family: Family) -> None:
    before = torch.get_rng_state()
    first = seed_of(family, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    second, other = seed_of(family, 5).read(), seed_of(family, 6).read()

    for name, array in first.read().items():
        assert np.array_equal(array, second[name])
        if "lora_A" in name:
            assert not np.array_equal(array, other[name])
            assert array.std() > 0
        if "lora_B" in name:
            assert not array.any()
    assert not any(module.training for module in first.model.modules())


@every_family
def test_what_is_written_is_read(family: Family) -> None:
    adapted, generator = seed_of(family, 0), np.random.default_rng(0)
    arrays = {
        name: generator.normal(size=array.shape).astype(np.float32)
        for name, array in adapted.read().items()
    }
    adapted.write(arrays)
    found = adapted.read()

    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
    some = list(arrays)[1:3]
    assert list(adapted.read(some)) == some


def test_arrays_that_were_read_share_no_memory_with_the_model() -> None:
    adapted = seed_of(VIT, 0)
    name = adapted.layout.names[0]
    held = adapted.read([name])[name]
    before, array = held.copy(), held + 1

    with pytest.raises(ValueError, match="read-only"):
        held += 1
    adapted.write({name: array})
    array += 1
    assert np.array_equal(held, before)
    assert np.array_equal(adapted.read([name])[name], before + 1)


def test_writing_some_arrays_leaves_the_others() -> None:
    adapted = seed_of(VIT, 0)
    before, name = adapted.read(), "head.bias"
    adapted.write({name: before[name] + 1})

    assert [n for n, a in adapted.read().items() if not np.array_equal(a, before[n])] == [name]


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("head.weigth", (5, 8), "did you mean 'head.weight'"),
        ("norm.weight", (8,), "array = 'norm.weight'"),
        ("head.weight", (8, 5), r"shape of head.weight = \(8, 5\)"),
        ("head.bias", (1,), r"shape of head.bias = \(1,\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_and_nothing_is_written(
    name: str, shape: tuple[int, ...], message: str
) -> None:
    adapted = seed_of(VIT, 0)
    before = adapted.read()
    fitting = {n: array + 1 for n, array in before.items() if n != name}

    with pytest.raises(InvalidValue, match=message):
        adapted.write({**fitting, name: np.zeros(shape, np.float32)})

    assert all(np.array_equal(array, before[n]) for n, array in adapted.read().items())


@every_family
def test_the_fingerprint_is_that_of_the_frozen_backbone(family: Family) -> None:
    first, second = seed_of(family, 0), seed_of(family, 1)
    arrays = {name: array + 1 for name, array in second.read().items()}
    second.write(arrays)
    changed = family.model().float()
    with torch.no_grad():
        weight = next(p for n, p in changed.named_parameters() if n.lower().endswith("norm.weight"))
        weight[-1] += 1e-6

    assert first.fingerprint == second.fingerprint
    assert len(first.fingerprint) == 32
    assert attach(changed, family.spec(), 0).fingerprint != first.fingerprint


def test_the_fingerprint_covers_the_base_weight_under_an_adapter_and_buffers() -> None:
    def fingerprint(name: str) -> str:
        model = SWIN.model().float()
        tensors: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
        if name:
            with torch.no_grad():
                tensors[name].view(-1)[0] += 1
        return attach(model, SWIN.spec(), 0).fingerprint

    names = (
        "",
        "layers.0.blocks.0.attn.qkv.weight",
        "layers.0.blocks.0.attn.qkv.bias",
        "layers.0.blocks.0.attn.relative_position_index",
    )
    assert len({fingerprint(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool,
     torch.complex64],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (0, 4), (1, 1, 1)])
def test_every_shape_and_type_of_a_frozen_array_has_a_fingerprint(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    def fingerprint(value: int) -> str:
        model = Small()
        for parameter in model.parameters():
            parameter.data.fill_(0.5)
        model.register_buffer("kept", torch.full(shape, value).to(dtype))
        return attach(model, LoRASpec(2, 4.0, 0.0, "first"), seed=0).fingerprint

    empty = 0 in shape
    assert fingerprint(0) == fingerprint(0)
    assert (fingerprint(0) == fingerprint(1)) is empty


def test_a_frozen_array_has_the_bytes_of_its_values_in_order() -> None:
    values = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    plain = values.numpy().tobytes()
    assert in_bytes(values).numpy().tobytes() == plain
    assert in_bytes(values.T.contiguous().T).numpy().tobytes() == plain
    assert in_bytes(values.to_sparse()).numpy().tobytes() == plain
    turned = torch.tensor([1 + 2j]).conj()
    assert in_bytes(turned).numpy().tobytes() == turned.resolve_conj().numpy().tobytes()


@every_family
def test_an_export_loads_with_plain_peft_and_gives_the_same_outputs(
    family: Family, tmp_path: Path
) -> None:
    adapted, records = family.adapted(), family.records(3)
    PrivateEngine(adapted, family.losses)
    adapted.export(tmp_path / "adapter")
    batch = records.batch(torch.arange(3))

    loaded = PeftModel.from_pretrained(family.model(), str(tmp_path / "adapter")).eval()

    with torch.no_grad():
        ours, theirs = family.losses(adapted.model, batch), family.losses(loaded, batch)
        bare = family.losses(family.model().eval(), batch)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert (ours - bare).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "'first' uses Dora"),
        ({"target_modules": "conv"}, "'conv' is a Conv2d"),
        ({"target_modules": "table"}, "'table' is a Embedding"),
        ({"lora_bias": True}, "'first' trains an adapter bias"),
        ({"modules_to_save": ["norm"]}, "'norm' is a LayerNorm"),
        ({"modules_to_save": ["last"]}, r"'last\.1' is a LayerNorm"),
        ({"bias": "all"}, "'conv.bias' is trainable"),
    ],
)
def test_what_cannot_be_clipped_record_by_record_is_refused_by_name(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PrivacyViolation, match=message):
        AdaptedModel(wrap(**changes))


def test_a_merged_adapter_is_refused_by_name() -> None:
    model = wrap()
    model.merge_adapter()
    with pytest.raises(PrivacyViolation, match="'first' is merged"):
        AdaptedModel(model)


def test_an_adapter_merged_later_is_refused_before_it_trains() -> None:
    adapted = VIT.adapted()
    adapted.model.merge_adapter()
    with pytest.raises(PrivacyViolation, match=r"'blocks\.0\.attn\.qkv' is merged"):
        PrivateEngine(adapted, VIT.losses)


def test_two_active_adapters_are_refused_by_name() -> None:
    model = wrap()
    model.add_adapter("second", LoraConfig(target_modules="first", r=2))
    model.base_model.set_adapter(["default", "second"])

    with pytest.raises(PrivacyViolation, match=r"\['default', 'second'\] are active"):
        AdaptedModel(model)


def test_another_trainable_parameter_is_refused_by_name() -> None:
    model = wrap()
    model.get_base_model().norm.weight.requires_grad_(True)

    with pytest.raises(PrivacyViolation, match=r"'norm\.weight' is trainable"):
        AdaptedModel(model)


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"targets": "fist"}, "lora-targets", "first"),
        ({"targets": "firs"}, "lora-targets", "first"),
        ({"head": ("lasst",)}, "head", "did you mean 'last'"),
        ({"head": ("last.0", "norms")}, "head", "norm"),
    ],
)
def test_names_that_match_nothing_are_refused_by_name(
    changes: dict[str, Any], key: str, message: str
) -> None:
    spec = LoRASpec(**{"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": "first", **changes})

    with pytest.raises(InvalidValue, match=message) as caught:
        attach(Small(), spec, seed=0)

    assert caught.value.key == key


def test_targets_that_are_no_regular_expression_are_refused_by_name() -> None:
    with pytest.raises(InvalidValue, match="lora-targets"):
        attach(Small(), LoRASpec(2, 4.0, 0.0, "first("), seed=0)


def test_a_target_that_is_no_linear_layer_is_refused_by_name() -> None:
    with pytest.raises(InvalidValue, match="'conv' is a Conv2d"):
        attach(Small(), LoRASpec(2, 4.0, 0.0, "conv|first"), seed=0)


def test_a_head_whose_name_ends_another_modules_name_trains_alone_or_is_refused() -> None:
    model = Small()
    model.blast = nn.Linear(4, 4)

    with pytest.raises(InvalidValue, match="'blast'") as caught:
        attach(model, LoRASpec(2, 4.0, 0.0, "first", ("last",)), seed=0)

    assert caught.value.key == "head"


def test_a_head_trains_no_more_than_its_name_says() -> None:
    model = ROBERTA.model()
    spec = LoRASpec(2, 4.0, 0.0, r".*\.query", ("classifier.dense",))

    names = attach(model, spec, seed=0).layout.names

    assert [n for n in names if "lora" not in n] == [
        "classifier.dense.weight",
        "classifier.dense.bias",
    ]
