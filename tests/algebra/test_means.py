from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlora_flwr.algebra.means import MovingAverage, merge, normalize, weighted_mean
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import Layout
from fedlora_flwr.plan import ComponentPlan

M, N, R = 7, 6, 3
Array64 = NDArray[np.float64]

seeds = st.integers(0, 2**32 - 1)
weight_lists = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


def client_arrays(rng: np.random.Generator, blocks: int = 1) -> dict[str, Array64]:
    arrays: dict[str, Array64] = {}
    for block in range(blocks):
        arrays[f"blocks.{block}.fc.lora_A.weight"] = rng.normal(size=(R, N))
        arrays[f"blocks.{block}.fc.lora_B.weight"] = rng.normal(size=(M, R))
    return arrays


def average(weights: list[float], values: list[Array64]) -> Array64:
    """The weighted mean, written independently of the code under test."""
    return np.asarray(np.average(np.stack(values), axis=0, weights=weights), dtype=np.float64)


@given(seeds, weight_lists, st.sampled_from("AB"))
def test_with_one_factor_frozen_the_mean_is_exact(
    seed: int, weights: list[float], active: str
) -> None:
    rng = np.random.default_rng(seed)
    start = client_arrays(rng)
    a, b = start
    trained = a if active == "A" else b
    uploads = [{trained: rng.normal(size=start[trained].shape)} for _ in weights]

    merged = merge(start, weighted_mean(uploads, weights))

    products = [{**start, **upload} for upload in uploads]
    exact = average(weights, [np.asarray(p[b] @ p[a]) for p in products])
    np.testing.assert_allclose(merged[b] @ merged[a], exact, rtol=0, atol=1e-12)


@given(seeds, weight_lists, st.lists(st.sampled_from("AB"), min_size=1, max_size=4))
def test_with_a_frozen_factor_in_each_block_every_blocks_mean_is_exact(
    seed: int, weights: list[float], modes: list[str]
) -> None:
    rng = np.random.default_rng(seed)
    start = client_arrays(rng, blocks=len(modes))
    plan = ComponentPlan.parse("".join(modes))
    names = Layout.of(start).trained(plan, num_steps=1)
    uploads = [{name: rng.normal(size=start[name].shape) for name in names} for _ in weights]

    merged = merge(start, weighted_mean(uploads, weights))

    for block in range(len(modes)):
        a, b = (f"blocks.{block}.fc.lora_{factor}.weight" for factor in "AB")
        products = [{**start, **upload} for upload in uploads]
        exact = average(weights, [np.asarray(p[b] @ p[a]) for p in products])
        np.testing.assert_allclose(merged[b] @ merged[a], exact, rtol=0, atol=1e-12)


@given(seeds, weight_lists)
def test_with_both_free_the_error_is_the_covariance(seed: int, weights: list[float]) -> None:
    rng = np.random.default_rng(seed)
    uploads = [client_arrays(rng) for _ in weights]
    a, b = uploads[0]

    mean = weighted_mean(uploads, weights)

    error = average(weights, [u[b] @ u[a] for u in uploads]) - mean[b] @ mean[a]
    covariance = average(weights, [(u[b] - mean[b]) @ (u[a] - mean[a]) for u in uploads])
    np.testing.assert_allclose(error, covariance, rtol=0, atol=1e-12)


@given(st.lists(st.floats(0, 1e308), min_size=1).filter(any))
def test_weights_sum_to_one_and_keep_their_ratios(weights: list[float]) -> None:
    shares = normalize(weights)
    assert shares.sum() == pytest.approx(1, abs=1e-9)
    largest = max(weights)
    np.testing.assert_allclose(
        shares / shares.max(), np.asarray(weights) / largest, rtol=1e-9, atol=1e-300
    )


@pytest.mark.parametrize(
    "weights",
    [[], [0.0], [0.0, 0.0], [1.0, -1e-9], [1.0, float("nan")], [1.0, float("inf")]],
)
def test_weights_that_mean_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(InvalidValue, match="weights"):
        normalize(weights)


def test_only_the_ratio_of_weights_matters() -> None:
    uploads = [{"x": np.array([1.0, 5.0])}, {"x": np.array([4.0, -1.0])}]
    np.testing.assert_allclose(weighted_mean(uploads, [1, 3])["x"], [3.25, 0.5])
    np.testing.assert_allclose(weighted_mean(uploads, [10, 30])["x"], [3.25, 0.5])


def test_a_weight_for_each_upload() -> None:
    with pytest.raises(InvalidValue, match="one for each of 2 uploads"):
        weighted_mean([{"x": np.zeros(1)}, {"x": np.zeros(1)}], [1.0])


@pytest.mark.parametrize(
    "other",
    [
        {"x": np.zeros((2, 3)), "z": np.zeros(1)},
        {"x": np.zeros((2, 3))},
        {"x": np.zeros((3, 2)), "y": np.zeros(1)},
        {"x": np.zeros((2, 3)), "y": np.zeros(1), "z": np.zeros(1)},
    ],
)
def test_uploads_that_do_not_match_are_refused(other: dict[str, Array64]) -> None:
    first = {"x": np.zeros((2, 3)), "y": np.zeros(1)}
    with pytest.raises(InvalidValue, match="shapes of an upload"):
        weighted_mean([first, other], [1.0, 1.0])


@given(seeds, st.integers(1, 8))
def test_the_same_order_gives_the_same_bits(seed: int, clients: int) -> None:
    rng = np.random.default_rng(seed)
    uploads = [{"x": rng.normal(size=50).astype(np.float32)} for _ in range(clients)]
    weights = list(rng.uniform(0.1, 9, clients))
    first, again = weighted_mean(uploads, weights)["x"], weighted_mean(uploads, weights)["x"]
    assert first.dtype == np.float32
    assert first.tobytes() == again.tobytes()


def test_sums_run_in_double_precision() -> None:
    uploads = [{"x": np.array([v], np.float32)} for v in (2.0**25, 1.0, 1.0, -(2.0**25))]
    assert weighted_mean(uploads, [1.0] * 4)["x"] == np.float32(0.5)


def test_a_lone_client_is_its_own_mean() -> None:
    array = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    np.testing.assert_array_equal(weighted_mean([{"x": array}], [0.3])["x"], array)


def test_merge_keeps_what_the_update_lacks() -> None:
    rng = np.random.default_rng(1)
    current = client_arrays(rng, blocks=2)
    name = "blocks.1.fc.lora_B.weight"
    update = {name: rng.normal(size=(M, R))}

    merged = merge(current, update)

    assert list(merged) == list(current)
    assert merged[name] is update[name]
    assert all(merged[other] is current[other] for other in current if other != name)


@pytest.mark.parametrize(
    ("update", "message"),
    [({"y": np.zeros(2)}, "array = 'y'"), ({"x": np.zeros(3)}, r"shape of x = \(3,\)")],
)
def test_merge_refuses_what_has_no_place(update: dict[str, Array64], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        merge({"x": np.zeros(2)}, update)


def test_a_moving_average_weighs_rounds_as_documented() -> None:
    rng = np.random.default_rng(3)
    models = [{"x": rng.normal(size=(2, 3)).astype(np.float32)} for _ in range(40)]
    average = MovingAverage(0.75)

    found = [average.add(model)["x"] for model in models]

    decays = [min(0.75, t / (t + 9)) for t in range(40)]
    for last in (0, 1, 5, 39):
        # Each round's weight, written out: its own share times the later rounds' decays.
        weights = [(1 - decays[t]) * math.prod(decays[t + 1 : last + 1]) for t in range(last + 1)]
        assert math.isclose(sum(weights), 1)
        mean = sum(w * m["x"].astype(np.float64) for w, m in zip(weights, models, strict=False))
        np.testing.assert_allclose(found[last], mean, rtol=0, atol=1e-7)
        assert found[last].dtype == np.float32
    assert decays[26] < 0.75 == decays[27]


def test_without_decay_the_average_is_the_last_model_bit_for_bit() -> None:
    average = MovingAverage(0.0)
    average.add({"x": np.array([math.nan, 1.0])})
    last = {"x": np.array([3.0, -0.0, 2.0])}
    assert average.add(last)["x"].tobytes() == last["x"].tobytes()
