"""What is exported after folding or resizing, and how it trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from fedlora_flwr.layout import folded_names
from fedlora_flwr.lora.adapters import AdaptedModel, attach
from fedlora_flwr.privacy.mechanism import Mechanism
from tests.lora.support import RANKS, Arrays, every_family, folded, state_bits
from tests.models import (
    LLAMA,
    SWIN,
    VIT,
    Family,
    engine_of,
    update,
)


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
    # A round at the first rank, so that what the optimizer kept of it has another shape.
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
