"""Pairs that a server folds into frozen weights, against dense arithmetic and plain PEFT."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fedlora_flwr.errors import FedLoRAError, InvalidValue
from fedlora_flwr.layout import folded_names
from fedlora_flwr.lora.adapters import AdaptedModel, LoRASpec, attach
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.noise import SeededNoise
from tests.lora.support import RANKS, Arrays, bits, every_family, folded, state_bits
from tests.models import (
    PLAIN_SGD,
    SWIN,
    VIT,
    Family,
    active,
    engine_of,
    loop_gradients,
)


def weights(adapted: AdaptedModel) -> dict[str, Tensor]:
    """Return a copy of the frozen weights under the adapters."""
    found = {}
    for layer in adapted.layers:
        assert isinstance(layer.base.weight, Tensor)
        found[layer.name] = layer.base.weight.detach().clone()
    return found


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
def test_a_quantized_weight_is_refused_by_name_and_nothing_is_written(weight: Tensor) -> None:
    adapted = attach(VIT.model().float(), VIT.spec(), seed=0)
    adapted.layers[0].base.weight = nn.Parameter(weight, requires_grad=False)
    held = state_bits(adapted)

    with pytest.raises(InvalidValue, match=f"weight of {LAYER}"):
        adapted.write({**adapted.read(), **folded(adapted.layers, 1)})

    assert state_bits(adapted) == held


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
