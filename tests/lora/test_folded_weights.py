"""Pairs that a server folds into frozen weights, against dense arithmetic and plain PEFT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fedlora_flwr.errors import FedLoRAError, InvalidValue
from fedlora_flwr.layout import folded_names
from fedlora_flwr.lora.adapters import AdaptedLinear, AdaptedModel, LoRASpec, attach
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.noise import SeededNoise
from tests.models import (
    FAMILIES,
    LLAMA,
    PLAIN_SGD,
    SWIN,
    VIT,
    Family,
    active,
    engine_of,
    loop_gradients,
    update,
)

Arrays = dict[str, NDArray[np.float32]]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
RANKS = (2, 0, 1, 5)


def folded(layers: Iterable[AdaptedLinear], seed: int, ranks: tuple[int, ...] = RANKS) -> Arrays:
    """Return a random pair for every layer, of these ranks in turn."""
    rng, arrays = np.random.default_rng(seed), {}
    for i, layer in enumerate(layers):
        q, (b, a) = ranks[i % len(ranks)], folded_names(layer.name)
        arrays[b] = 0.3 * rng.normal(size=(layer.B.shape[0], q)).astype(np.float32)
        arrays[a] = 0.3 * rng.normal(size=(q, layer.A.shape[1])).astype(np.float32)
    return arrays


def weights(adapted: AdaptedModel) -> dict[str, Tensor]:
    """Return a copy of the frozen weights under the adapters."""
    found = {}
    for layer in adapted.layers:
        assert isinstance(layer.base.weight, Tensor)
        found[layer.name] = layer.base.weight.detach().clone()
    return found


def bits(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    return {
        name: tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors.items()
    }


def state_bits(adapted: AdaptedModel) -> dict[str, bytes]:
    """Return the bits of every parameter and buffer of the whole model."""
    model = adapted.model
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return bits({name: tensor.detach() for name, tensor in tensors.items()})


def dense(family: Family, arrays: Arrays) -> PeftModel:
    """Return a copy that only PEFT and dense additions have touched."""
    plain = family.plain()
    for name, module in plain.named_modules():
        layer = name.removeprefix("base_model.model.")
        b, a = folded_names(layer)
        if b in arrays:
            with torch.no_grad():
                delta = arrays[b].astype(np.float64) @ arrays[a].astype(np.float64)
                module.base_layer.weight += 2.0 * torch.from_numpy(delta)
    return plain


@every_family
def test_the_folded_model_is_that_of_dense_weights(family: Family) -> None:
    adapted, records = family.adapted(), family.records(4)
    arrays = folded(adapted.layers, 1)
    batch = records.batch(torch.arange(4))
    with torch.no_grad():
        before = family.losses(adapted.model, batch)
        adapted.write(arrays)
        found = family.losses(adapted.model, batch)
        expected = family.losses(dense(family, arrays), batch)

    assert {layer.scaling for layer in adapted.layers} == {2.0}
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (found - before).abs().max() > 1e-3


@every_family
def test_private_steps_see_folded_weights_and_leave_them(family: Family) -> None:
    engine, records = engine_of(family), family.records(4)
    adapted = engine.adapted
    arrays = folded(adapted.layers, 1)
    adapted.write(arrays)
    frozen = bits(weights(adapted))
    names = active(adapted, "*")

    found = engine.gradients_by_record(records, torch.arange(4), names)

    expected = loop_gradients(family, dense(family, arrays), records, range(4))
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-11)
    engine.start_round(Mechanism(1.0, 1.0, 2, 4), PLAIN_SGD, SeededNoise(0))
    engine.step(records, torch.arange(3), names)
    assert bits(weights(adapted)) == frozen


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_layer_whose_pair_is_left_out_gets_its_own_bits_back(
    family: Family, dtype: torch.dtype
) -> None:
    adapted = attach(family.model().to(dtype), family.spec(), seed=0)
    start, whole = weights(adapted), state_bits(adapted)
    arrays = folded(adapted.layers, 1, (2, 1))
    adapted.write(arrays)
    assert all(not torch.equal(w, start[name]) for name, w in weights(adapted).items())

    # Another pair for the first, none for the second, the same for the rest.
    first, second = adapted.layers[:2]
    fewer = {n: a for n, a in arrays.items() if n not in folded_names(second.name)}
    fewer.update(folded([first], 9))
    held = weights(adapted)
    adapted.write(fewer)
    now = weights(adapted)
    assert not torch.equal(now[first.name], held[first.name])
    assert bits(now)[second.name] == bits(start)[second.name]
    for layer in adapted.layers[2:]:
        assert bits(now)[layer.name] == bits(held)[layer.name]

    adapted.write(adapted.read([]))
    assert state_bits(adapted) == whole
    adapted.write(arrays)
    assert bits(weights(adapted)) == bits(held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_depend_on_the_last_pairs_alone_and_are_rounded_once(dtype: torch.dtype) -> None:
    def model() -> AdaptedModel:
        return attach(SWIN.model().to(dtype), SWIN.spec(), seed=0)

    layers = model().layers
    sequence = [folded(layers, seed, ranks) for seed, ranks in ((1, RANKS), (2, (3,)), (3, (0, 7)))]
    last = folded(layers, 4)
    straight, around = model(), model()
    start = weights(straight)
    straight.write(last)
    for arrays in (last, *sequence, {}, last, sequence[0]):
        around.write(arrays)
    around.write(dict(reversed(last.items())))

    assert state_bits(around) == state_bits(straight)
    for layer in layers:
        b, a = (last[name].astype(np.float64) for name in folded_names(layer.name))
        exact = start[layer.name].double() + layer.scaling * torch.from_numpy(b @ a)
        # BLAS may sum in another order, which moves a rounding by one unit at most.
        found = weights(straight)[layer.name]
        gap = (found.double() - exact).abs()
        unit = torch.finfo(dtype).eps * exact.abs().clamp(min=1e-30)
        assert bool((gap <= 0.51 * unit + 1e-15).all())


def test_rank_zero_is_nothing() -> None:
    adapted = attach(VIT.model().float(), VIT.spec(), seed=0)
    start = weights(adapted)
    adapted.write(folded(adapted.layers, 0, (3,)))
    adapted.write(folded(adapted.layers, 0, (0,)))
    assert all(torch.equal(w, start[name]) for name, w in weights(adapted).items())


def test_a_caller_may_overwrite_what_it_gave(tmp_path: Path) -> None:
    results = []
    for spoil in (False, True):
        adapted = attach(VIT.model().float(), VIT.spec(), seed=0)
        arrays = folded(adapted.layers, 1)
        adapted.write(arrays)
        if spoil:
            for array in arrays.values():
                array += 1
        folder = tmp_path / str(spoil)
        adapted.export(folder)
        results.append((folder / "adapter_model.safetensors").read_bytes())
        # The same object with other values is another pair.
        adapted.write(arrays)
        results.append(b"".join(bits(weights(adapted)).values()))
    assert results[0] == results[2]
    assert results[1] != results[3]


@every_family
def test_the_fingerprint_is_that_of_the_backbone_whatever_is_folded_in(family: Family) -> None:
    def model() -> AdaptedModel:
        return attach(family.model().float(), family.spec(), seed=0)

    untouched, asked_late, taken_out = model(), model(), model()
    arrays = folded(asked_late.layers, 1)
    asked_late.write(arrays)
    taken_out.write(arrays)
    taken_out.write({})
    assert untouched.fingerprint == asked_late.fingerprint == taken_out.fingerprint


LAYER = "blocks.0.attn.qkv"
FOLDED_B, FOLDED_A = folded_names(LAYER)


def zeros(*shape: int) -> NDArray[np.float32]:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ({FOLDED_B: zeros(24, 2)}, f"folded into {LAYER}"),
        ({FOLDED_A: zeros(2, 8)}, f"folded into {LAYER}"),
        ({FOLDED_B: zeros(24, 2), FOLDED_A: zeros(3, 8)}, f"folded into {LAYER}"),
        ({FOLDED_B: zeros(23, 2), FOLDED_A: zeros(2, 8)}, f"folded into {LAYER}"),
        ({FOLDED_B: zeros(24, 2), FOLDED_A: zeros(2, 9)}, f"folded into {LAYER}"),
        ({FOLDED_B: zeros(2, 24), FOLDED_A: zeros(8, 2)}, f"folded into {LAYER}"),
        ({FOLDED_B: zeros(24), FOLDED_A: zeros(8)}, f"folded into {LAYER}"),
        ({FOLDED_B: zeros(24, 1, 1), FOLDED_A: zeros(1, 8)}, f"folded into {LAYER}"),
        (
            {
                "blocks.9.attn.qkv.folded_B.weight": zeros(24, 1),
                "blocks.9.attn.qkv.folded_A.weight": zeros(1, 8),
            },
            r"blocks\.9",
        ),
        # A layer of the model that has no adapter.
        ({"head.folded_B.weight": zeros(5, 1), "head.folded_A.weight": zeros(1, 8)}, "head"),
        ({f"{LAYER}.lora_B.weight": zeros(24, 9)}, "shape of"),
    ],
)
def test_pairs_that_do_not_fit_are_refused_and_nothing_is_written(
    pair: Arrays, message: str
) -> None:
    adapted = attach(VIT.model().float(), VIT.spec(), seed=0)
    before = folded(adapted.layers, 1)
    adapted.write(before)
    held = state_bits(adapted)
    change = {name: array + 1 for name, array in adapted.read().items()}
    change.update({n: a + 1 for n, a in before.items() if LAYER not in n})

    with pytest.raises(InvalidValue, match=message):
        adapted.write({**change, **pair})

    assert state_bits(adapted) == held
    # Nor is what is folded in forgotten.
    adapted.write(before)
    assert state_bits(adapted) == held


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(24, 8, dtype=torch.int8), torch.zeros(96, 1, dtype=torch.uint8), torch.zeros(192)],
    ids=["int8", "packed", "flat"],
)
def test_a_quantised_weight_is_refused_by_name_and_nothing_is_written(weight: Tensor) -> None:
    adapted = attach(VIT.model().float(), VIT.spec(), seed=0)
    adapted.layers[0].base.weight = nn.Parameter(weight, requires_grad=False)
    held = state_bits(adapted)

    with pytest.raises(InvalidValue, match=f"weight of {LAYER}"):
        adapted.write({**adapted.read(), **folded(adapted.layers, 1)})

    assert state_bits(adapted) == held


def losses(family: Family, model: nn.Module, count: int = 4) -> Tensor:
    with torch.no_grad():
        return family.losses(model.eval(), family.records(count).batch(torch.arange(count)))


def assert_exported(family: Family, adapted: AdaptedModel, folder: Path) -> PeftModel:
    """Export, load with plain PEFT onto the backbone as it came, and compare the outputs."""
    held, config = state_bits(adapted), adapted.model.peft_config["default"].to_dict()
    adapted.export(folder)
    # Export has left nothing behind.
    assert state_bits(adapted) == held
    assert adapted.model.peft_config["default"].to_dict() == config
    loaded = PeftModel.from_pretrained(family.model(), str(folder))
    ours = losses(family, adapted.model)
    torch.testing.assert_close(ours, losses(family, loaded), rtol=0, atol=1e-5)
    assert (ours - losses(family, family.model())).abs().max() > 1e-3
    return loaded


def fill(adapted: AdaptedModel, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {n: 0.3 * rng.normal(size=a.shape).astype(np.float32) for n, a in adapted.read().items()}


@every_family
@pytest.mark.parametrize("rslora", [False, True])
def test_an_export_with_folded_pairs_is_the_same_model_for_plain_peft(
    family: Family, rslora: bool, tmp_path: Path
) -> None:
    adapted = attach(family.model(), replace(family.spec(0.1), rslora=rslora), seed=1)
    arrays = folded(adapted.layers, 1)
    # One layer has no pair at all.
    for name in folded_names(adapted.layers[2].name):
        arrays.pop(name, None)
    adapted.write({**fill(adapted, 2), **arrays})
    loaded = assert_exported(family, adapted, tmp_path / "first")

    ranks = [m.lora_A["default"].out_features for m in loaded.modules() if hasattr(m, "lora_A")]
    folds = [0 if i == 2 else RANKS[i % 4] for i in range(len(adapted.layers))]
    assert ranks == [3 + q for q in folds]
    # A second export says what is folded in then.
    adapted.write(fill(adapted, 3))
    loaded = assert_exported(family, adapted, tmp_path / "second")
    assert loaded.peft_config["default"].rank_pattern == {}
    assert loaded.peft_config["default"].alpha_pattern == {}
    assert loaded.peft_config["default"].r == 3


@pytest.mark.parametrize("family", [SWIN, LLAMA], ids=lambda family: family.name)
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 7])
def test_another_rank_keeps_the_scaling_and_exports(
    family: Family, rslora: bool, rank: int, tmp_path: Path
) -> None:
    adapted = attach(family.model(), replace(family.spec(), rslora=rslora), seed=1)
    scaling = [layer.scaling for layer in adapted.layers]
    fingerprint, names = adapted.fingerprint, adapted.layout.names
    adapted.resize(rank)
    assert adapted.rank == rank
    assert adapted.layout.names == names
    assert not any(array.any() for n, array in adapted.read().items() if "lora_" in n)
    arrays = fill(adapted, 2)
    assert {a.shape[0] for n, a in arrays.items() if "lora_A" in n} == {rank}
    adapted.write(arrays)
    assert_exported(family, adapted, tmp_path / "bare")
    adapted.write(folded(adapted.layers, 1))
    assert_exported(family, adapted, tmp_path / "folded")

    assert [layer.scaling for layer in adapted.layers] == scaling
    assert adapted.fingerprint == fingerprint
    assert np.array_equal(adapted.read()[names[0]], arrays[names[0]])
    # W0 + s·B·A, by hand on one layer.
    adapted.write({})
    layer = adapted.layers[0]
    x = torch.randn(3, layer.A.shape[1], dtype=torch.float64)
    full = layer.base(x) + scaling[0] * (x @ layer.A.T @ layer.B.T)
    torch.testing.assert_close(layer.module(x), full, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["A", "B", "*"])
def test_a_resized_model_trains_like_one_padded_with_zeros(mode: str) -> None:
    engine, whole, records = engine_of(VIT), engine_of(VIT), VIT.records(4)
    mechanism = Mechanism(0.0, 0.05, 2, 4)
    # A round at the first rank, so that what the optimiser kept of it has another shape.
    update(engine, records, [0, 1], "*", mechanism)
    engine.adapted.resize(2)
    small = fill(engine.adapted, 5)
    padded = {}
    for name, array in small.items():
        axis = {"A": 0, "B": 1}.get(name[-8] if "lora_" in name else "")
        pads = [(0, 1 if axis == i else 0) for i in range(array.ndim)]
        padded[name] = np.pad(array, pads)
    engine.adapted.write(small)
    whole.adapted.write(padded)

    found = update(engine, records, [3, 1, 2], mode, mechanism)
    expected = update(whole, records, [3, 1, 2], mode, mechanism)

    for name, moved in found.items():
        corner = expected[name][tuple(slice(size) for size in moved.shape)]
        torch.testing.assert_close(moved, corner, rtol=1e-9, atol=1e-12)
        assert expected[name].square().sum() == pytest.approx(float(corner.square().sum()))


# What follows are models that are no test family: each is right or refused, never wrong.


def gpt2() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=30, n_positions=16, n_embd=8, n_layer=1, n_head=2, eos_token_id=1
        )
        return GPT2LMHeadModel(config)


@pytest.mark.parametrize("target", ["c_proj", "c_attn"])
def test_a_weight_kept_transposed_is_folded_right_or_refused(target: str) -> None:
    adapted = attach(gpt2(), LoRASpec(2, 4.0, 0.0, rf".*attn\.{target}"), seed=0)
    layer = adapted.layers[0]
    arrays = folded([layer], 1, (2,))
    x = torch.randn(3, 8)
    with torch.no_grad():
        before = layer.module(x)
        try:
            adapted.write(arrays)
        except InvalidValue:
            assert torch.equal(layer.module(x), before)
            return
        b, a = (torch.from_numpy(arrays[name]) for name in folded_names(layer.name))
        expected = before + layer.scaling * (x @ a.T @ b.T)
        torch.testing.assert_close(layer.module(x), expected, rtol=1e-5, atol=1e-5)


def test_a_weight_that_another_module_reads_is_not_changed_under_it() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=40,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=20,
            tie_word_embeddings=True,
        )
        model: Any = LlamaForCausalLM(config)
    adapted = attach(model, LoRASpec(2, 4.0, 0.0, "lm_head"), seed=0)
    table = model.model.embed_tokens.weight
    before = table.detach().clone()
    with suppress(FedLoRAError):
        adapted.write(folded(adapted.layers, 1, (2,)))
    assert torch.equal(table, before)


class Towers(nn.Module):
    """Two layers, the name of one being the end of the other's."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.fc, self.vision = nn.Linear(4, 4), nn.Module()
            self.vision.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.fc(x)
        output: Tensor = self.vision.fc(hidden.tanh())  # type: ignore[operator]
        return output


def towers(**changes: Any) -> AdaptedModel:
    config = LoraConfig(**{"target_modules": r"(vision\.)?fc", "r": 2, "lora_alpha": 4, **changes})
    adapted = AdaptedModel(get_peft_model(Towers(), config))
    adapted.write(fill(adapted, 0))
    adapted.model.eval()
    return adapted


def assert_towers_exported(adapted: AdaptedModel, folder: Path) -> None:
    adapted.export(folder)
    loaded = PeftModel.from_pretrained(Towers(), str(folder)).eval()
    x = torch.randn(5, 4)
    torch.testing.assert_close(loaded(x), adapted.model(x), rtol=1e-4, atol=1e-4)


def test_an_export_tells_layers_apart_whose_names_end_alike(tmp_path: Path) -> None:
    adapted = towers()
    adapted.write(folded(adapted.layers, 1, (1, 3)))
    assert_towers_exported(adapted, tmp_path / "adapter")


@pytest.mark.parametrize("fold", [False, True])
def test_an_export_keeps_the_scalings_that_the_model_came_with(fold: bool, tmp_path: Path) -> None:
    adapted = towers(alpha_pattern={r"vision\.fc": 32})
    assert [layer.scaling for layer in adapted.layers] == [2.0, 16.0]
    if fold:
        adapted.write(folded(adapted.layers, 1, (0, 1)))
    assert_towers_exported(adapted, tmp_path / "adapter")
