"""Starts from the weights alone: PEFT's own values, an unchanged model, and exports that fit."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import folded_names
from fedlora_flwr.lora.adapters import AdaptedModel, attach
from fedlora_flwr.lora.started import start_of
from fedlora_flwr.lora.weight_starts import OLORA, PISSA, check_start, weight_start
from tests.lora.support import every_family
from tests.models import VIT, Family

every_start = pytest.mark.parametrize("how", [PISSA, OLORA])


def started(family: Family, how: str, rslora: bool = False) -> AdaptedModel:
    adapted = attach(family.model(), replace(family.spec(), rslora=rslora), seed=1)
    adapted.write(weight_start(adapted, how))
    return adapted


def outputs(family: Family, model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return family.losses(model.eval(), family.records(4).batch(torch.arange(4)))


@every_family
@every_start
@pytest.mark.parametrize("rslora", [False, True])
def test_factors_and_rest_are_those_of_peft(family: Family, how: str, rslora: bool) -> None:
    spec = family.spec()
    config = LoraConfig(
        r=spec.rank, lora_alpha=6, target_modules=spec.targets, init_lora_weights=how,
        use_rslora=rslora,
    )  # fmt: skip
    # PEFT's PiSSA asks for fp32.
    theirs = get_peft_model(family.model().float(), config).get_base_model()
    ours = started(family, how, rslora)
    modules = dict(theirs.named_modules())
    for layer in ours.layers:
        peft = modules[layer.name]
        product = peft.lora_B["default"].weight @ peft.lora_A["default"].weight
        torch.testing.assert_close((layer.B @ layer.A).float(), product, rtol=1e-3, atol=1e-4)
        # The weight that is left, without the adapter.
        left = layer.base.weight.float()
        torch.testing.assert_close(left, peft.base_layer.weight, rtol=1e-3, atol=1e-4)


@every_family
@every_start
def test_the_model_is_the_same_at_the_start(family: Family, how: str) -> None:
    ours = started(family, how)
    before = outputs(family, family.model())
    torch.testing.assert_close(outputs(family, ours.model), before, rtol=0, atol=1e-5)
    assert all(bool(layer.B.any()) for layer in ours.layers)


@every_family
@every_start
def test_a_trained_export_is_the_same_model_for_plain_peft(
    family: Family, how: str, tmp_path: Path
) -> None:
    ours = started(family, how)
    rng = np.random.default_rng(0)
    moved = {n: a + 0.2 * rng.normal(size=a.shape) for n, a in ours.read().items()}
    pairs = {
        name: array
        for name, array in weight_start(ours, how).items()
        if name in {n for layer in ours.layers for n in folded_names(layer.name)}
    }
    ours.write({**moved, **pairs})
    ours.export(tmp_path)

    loaded = PeftModel.from_pretrained(family.model(), str(tmp_path))
    found = outputs(family, ours.model)
    torch.testing.assert_close(outputs(family, loaded), found, rtol=0, atol=1e-5)
    assert (found - outputs(family, family.model())).abs().max() > 1e-3


@every_start
def test_a_start_reads_the_original_weight_whatever_is_folded_in(how: str) -> None:
    adapted = attach(VIT.model(), VIT.spec(), seed=1)
    first = weight_start(adapted, how)
    adapted.write(first)
    again = weight_start(adapted, how)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    # Without the pair, each weight is what it was.
    adapted.write(adapted.read())
    state = VIT.model().state_dict()
    for layer in adapted.layers:
        weight: Any = layer.base.weight
        assert torch.equal(weight, state[f"{layer.name}.weight"])


def test_pissa_takes_the_largest_singular_values_and_olora_orthonormal_columns() -> None:
    adapted = attach(VIT.model(), VIT.spec(), seed=1)
    largest, columns = weight_start(adapted, PISSA), weight_start(adapted, OLORA)
    for layer in adapted.layers:
        base: Any = layer.base
        weight = base.weight.detach().numpy()
        b, a = (largest[f"{layer.name}.lora_{f}.weight"].astype(float) for f in "BA")
        left = weight - layer.scaling * b @ a
        values = np.linalg.svd(weight, compute_uv=False)
        rest = np.linalg.svd(left, compute_uv=False)
        assert rest[0] == pytest.approx(values[adapted.rank], rel=1e-4)
        assert math.isclose(float((b**2).sum()), float((a**2).sum()), rel_tol=1e-4)
        q = columns[f"{layer.name}.lora_B.weight"].astype(float)
        np.testing.assert_allclose(q.T @ q, np.eye(adapted.rank), atol=1e-5)


def test_a_random_start_is_what_it_was() -> None:
    adapted = attach(VIT.model(), VIT.spec(), seed=1)
    before = adapted.read()
    found = start_of(RunConfig(), adapted)
    assert found.keys() == before.keys()
    assert all(np.array_equal(found[name], before[name]) for name in before)


def test_what_cannot_have_such_a_start_is_refused_by_name() -> None:
    adapted = attach(VIT.model(), replace(VIT.spec(), rank=9), seed=1)
    with pytest.raises(InvalidValue, match=r"rank = 9 .*at most 8 with lora-init = 'pissa'"):
        check_start(adapted, PISSA)
    with pytest.raises(InvalidValue, match="lora-init = 'eva'"):
        check_start(adapted, "eva")
    others = ({"start": "/somewhere"}, {"strategy": "flexlora", "client-ranks": "2,4"})
    for other in others:
        with pytest.raises(InvalidValue, match=r"lora-init = 'olora' .*brings other factors"):
            RunConfig.of({"lora-init": "olora", **other})
