"""FFA-LoRA with several seeds: B trains under one A after another, and all pairs stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.numpy import load_file
from torch import nn

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import factor_of, folded_names
from fedlora_flwr.lora.adapters import LoRASpec, attach
from fedlora_flwr.lora.seeded import seeded
from fedlora_flwr.strategies import FFALoRA, FFASeeds, Upload
from tests.strategies.dense import LAYOUT, RANK, SIZES, Array, Federation, close, product, start
from tests.strategies.products import ExactMeans
from tests.strategies.resumed import assert_goes_on_bit_for_bit
from tests.strategies.tiny import plans


class TestFFASeeds(ExactMeans):
    method = FFASeeds
    planned = "B"
    folds = True


def test_plans_by_round() -> None:
    assert plans(FFASeeds(), rounds=4) == ["B"] * 4


def test_one_seed_is_ffa_lora() -> None:
    one, ffa = Federation(FFASeeds(seeds=1), rounds=3), Federation(FFALoRA(), rounds=3)
    assert one.result.arrays.keys() == ffa.result.arrays.keys()
    for name, array in ffa.result.arrays.items():
        assert one.result.arrays[name].data == array.data, name


def replayed(
    seeds: int, rounds: int, current: dict[str, Array], layer: str, rng: np.random.Generator
) -> tuple[list[Array], list[Array], list[Array], dict[str, Array]]:
    """Play rounds of one layer by the book: K separate pairs, of which one moves per round.

    Returns the B and A of all seeds, and each round's A, with what the strategy has made of the
    same uploads.
    """
    b, a = LAYOUT.pair(layer)
    method = FFASeeds(seeds=seeds)
    lefts, rights, used = [current[b]], [current[a]], []
    arrays = {b: current[b], a: current[a]}
    for number in range(rounds):
        turn = number % seeds
        if turn == len(lefts):
            lefts.append(np.zeros_like(lefts[0]))
            rights.append(arrays[a])
        np.testing.assert_array_equal(arrays[a], rights[turn])
        np.testing.assert_array_equal(arrays[b], lefts[turn])
        steps = rng.normal(size=(2, *lefts[turn].shape))
        uploads = [Upload(str(k), {b: arrays[b] + step}, 1.0, {}) for k, step in enumerate(steps)]
        lefts[turn] = (uploads[0].arrays[b] + uploads[1].arrays[b]) / 2
        used.append(arrays[a])
        arrays = dict(method.aggregate(number + 1, arrays, uploads))
    return lefts, rights, used, arrays


@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_the_model_is_the_sum_of_k_pairs_of_which_one_moves_per_round(
    seeds: int, rounds: int, seed: int
) -> None:
    layer = "blocks.0.fc"
    rng = np.random.default_rng(seed)
    lefts, rights, used, arrays = replayed(seeds, rounds, start(1, seed), layer, rng)
    expected = np.sum([left @ right for left, right in zip(lefts, rights, strict=True)], axis=0)
    close(product(arrays, layer), expected, 1e-12)
    assert len({array.tobytes() for array in used}) == min(seeds, rounds)
    if seeds == 1:
        return
    # The pairs stand side by side as they are: no decomposition has mixed their bases.
    (b, a), (rest_b, rest_a) = LAYOUT.pair(layer), folded_names(layer)
    columns = np.concatenate([arrays[b], arrays[rest_b]], axis=1)
    rows = np.concatenate([arrays[a], arrays[rest_a]], axis=0)
    assert rows.shape[0] == columns.shape[1] == min(seeds, rounds + 1)
    assert {row.tobytes() for row in rows} >= {right.tobytes() for right in rights}
    nonzero = {column.tobytes() for column in columns.T if column.any()}
    assert nonzero == {left.T.tobytes() for left in lefts if left.any()}


def test_seeds_are_drawn_by_run_layer_and_number_and_begin_without_effect() -> None:
    def drawn(seed: int) -> list[bytes]:
        run = Federation(FFASeeds(seed=seed), rounds=1)
        after = run.after(1)
        for layer in SIZES:
            b, a = LAYOUT.pair(layer)
            assert not after[b].any()
            assert np.abs(after[a]).max() <= SIZES[layer][1] ** -0.5
        return [after[LAYOUT.pair(layer)[1]][0, :3].tobytes() for layer in SIZES]

    first, again, other = drawn(5), drawn(5), drawn(6)
    assert first == again
    assert len({*first, *other}) == 4


def test_only_the_active_b_and_the_head_go_up_and_all_pairs_come_down() -> None:
    run = Federation(FFASeeds(), rounds=4)
    uploads = [content.array_records["arrays"] for content in run.tiny.uploads]
    for record in uploads:
        assert {factor_of(name) for name in record} == {"B", None}
        assert not any("folded" in name for name in record)
    for server_round in (2, 3, 4):
        for arrays in run.got[server_round].values():
            assert all(arrays[folded_names(layer)[0]].shape[1] == RANK for layer in SIZES)


def test_a_pair_that_the_start_has_folded_in_stays_where_it_is() -> None:
    layer, arrays = "blocks.1.fc", start(1)
    (b, a), (rest_b, rest_a) = LAYOUT.pair(layer), folded_names(layer)
    fixed = np.full((5, 2), 7.0), np.full((2, 9), 3.0)
    arrays = {b: arrays[b], a: arrays[a], rest_b: fixed[0], rest_a: fixed[1]}
    method = FFASeeds(seeds=3)
    for number in range(1, 8):
        upload = Upload("x", {b: arrays[b] + number}, 1.0, {})
        arrays = dict(method.aggregate(number, arrays, [upload]))
        np.testing.assert_array_equal(arrays[rest_b][:, :2], fixed[0])
        np.testing.assert_array_equal(arrays[rest_a][:2], fixed[1])
    assert len(arrays[rest_a]) == 2 + 2


def test_plain_peft_loads_k_pairs_as_one_adapter_of_their_ranks(tmp_path: Path) -> None:
    def plain() -> nn.Module:
        with seeded(3):
            return nn.Sequential(nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 2))

    spec = LoRASpec(rank=1, alpha=3.0, dropout=0.0, targets="0")
    adapted, method = attach(plain(), spec, seed=1), FFASeeds(seeds=3)
    arrays: dict[str, Any] = {**adapted.read()}
    for number in range(1, 6):
        step = np.random.default_rng(number).normal(size=(5, 1)).astype(np.float32)
        upload = Upload("x", {"0.lora_B.weight": arrays["0.lora_B.weight"] + step}, 1.0, {})
        arrays = {**method.aggregate(number, arrays, [upload])}
    adapted.write(arrays)
    adapted.export(tmp_path)

    found = load_file(tmp_path / "adapter_model.safetensors")
    b, a = (found[f"base_model.model.0.lora_{factor}.weight"] for factor in "BA")
    assert (b.shape, a.shape) == ((5, 3), (3, 9))
    x = torch.linspace(-1, 1, 36).reshape(4, 9)
    loaded = PeftModel.from_pretrained(plain(), str(tmp_path)).eval()
    with torch.no_grad():
        expected = adapted.model(x)
        weight = plain()[0].weight + 3.0 * torch.from_numpy(b @ a)  # type: ignore[index]
        torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            adapted.model(x), _by_hand(plain(), weight, x), rtol=0, atol=1e-5
        )


def _by_hand(model: Any, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return model[2](torch.relu(x @ weight.T + model[0].bias))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("seeds", "folded", "fits"), [(4, 0, True), (5, 0, False), (4, 1, False)])
def test_seeds_that_do_not_fit_into_a_layer_are_refused(
    seeds: int, folded: int, fits: bool
) -> None:
    shapes: dict[str, Any] = {"fc.lora_A.weight": (3, 9), "fc.lora_B.weight": (20, 3)}
    if folded:
        shapes |= {"fc.folded_A.weight": (folded, 9), "fc.folded_B.weight": (20, folded)}
    if fits:
        FFASeeds(seeds=seeds).check_model(shapes)
        return
    with pytest.raises(InvalidValue) as raised:
        FFASeeds(seeds=seeds).check_model(shapes)
    for word in ("ffa-seeds.seeds", str(seeds), "at rank 3", "fc has a weight of shape (20, 9)"):
        assert word in str(raised.value)


def test_a_run_refuses_them_before_it_asks_anybody() -> None:
    with pytest.raises(InvalidValue, match=r"ffa-seeds\.seeds"):
        Federation(FFASeeds(seeds=3), rounds=1)


@pytest.mark.parametrize("saved_after", [1, 2, 3])
def test_a_saved_run_goes_on_bit_for_bit(saved_after: int) -> None:
    assert_goes_on_bit_for_bit(FFASeeds, saved_after=saved_after)
