from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_flwr.errors import InvalidValue, OrderRefused
from fedlora_flwr.layout import Layout
from fedlora_flwr.wire import MOST_ENTRY
from fedlora_flwr.wire.order import Order, check_shapes, named_arrays

KEYS = ["server-round", "plan", "array-names", "weighting", "fingerprint", "share"]
OWN = {
    "blocks.0.fc.lora_A.weight": np.zeros((2, 3), np.float32),
    "blocks.0.fc.lora_B.weight": np.zeros((4, 2), np.float32),
    "head.bias": np.zeros(5, np.float32),
}
A_NAME, B_NAME, HEAD = OWN
FOLDED = {
    "blocks.0.fc.folded_B.weight": np.ones((4, 3), np.float32),
    "blocks.0.fc.folded_A.weight": np.ones((3, 3), np.float32),
}


def test_an_order_is_written_and_read() -> None:
    order = Order(3, "B/A", "a,b", "size", "0f", "A")
    assert list(order.to_config()) == KEYS
    assert Order.from_config(order.to_config()) == order
    assert Order.from_config({}) == Order()
    assert Order().to_config() == {}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"server-round": -1}, "server-round = -1"),
        ({"server-round": True}, "server-round = True"),
        ({"server-round": 1.0}, "server-round = 1.0"),
        ({"server-round": 10**9}, "server-round"),
        ({"plan": ["B"]}, "plan"),
        ({"plan": "B" * 200_000}, "plan"),
        ({"weighting": "n"}, "weighting = 'n'"),
        ({"share": "BA"}, "share = 'BA'"),
        ({"curvature": "secant"}, "'curvature'"),
        ({"fingerprint": "0" * 200}, "fingerprint"),
        ({"learning-rate": 0.1}, "'learning-rate'"),
        ({"epsilon": 100.0}, "'epsilon'"),
    ],
)
def test_what_an_order_cannot_hold_is_refused_by_name(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(OrderRefused) as caught:
        Order.from_config(config)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_a_whole_number_stands_for_a_float_and_nothing_else_does() -> None:
    assert Order.from_config({"proximal-mu": 1}) == Order(proximal_mu=1.0)
    for value in (True, -1, 10**6, 10**400, math.nan, math.inf, "1"):
        with pytest.raises(OrderRefused, match="proximal-mu"):
            Order.from_config({"proximal-mu": value})


def test_an_own_start_is_one_word_under_which_all_that_trains_is_kept() -> None:
    order = Order.from_config({"start-from": "own"})
    assert order.keeps
    assert order.stays("head.bias")
    assert order.leaves("head.bias")
    assert not Order().keeps
    for value in ("theirs", True, 1):
        with pytest.raises(OrderRefused, match="start-from"):
            Order.from_config({"start-from": value})


def test_flowers_own_words_pass() -> None:
    assert Order.from_config({"clipping_norm": 1.0, "norm_bit": True}) == Order()


@settings(max_examples=500)
@given(
    st.dictionaries(
        st.one_of(st.sampled_from(KEYS), st.text(max_size=5)),
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary()),
    )
)
def test_any_configuration_is_read_or_refused(config: dict[str, Any]) -> None:
    try:
        order = Order.from_config(config)
    except OrderRefused:
        return
    written = order.to_config()
    assert all(config[key] == value for key, value in written.items())
    assert set(config) <= {*KEYS, "clipping_norm", "norm_bit"}


FOUR_BLOCKS = Layout(tuple(f"blocks.{n}.fc.lora_{f}.weight" for n in range(4) for f in "AB"))


@pytest.mark.parametrize("plan", ["C", "B//A", "BA", "*AB", "B/", "-", "B/----"])
def test_a_plan_that_fits_no_model_is_refused(plan: str) -> None:
    with pytest.raises(OrderRefused, match="plan"):
        Order(plan=plan).plan_for(FOUR_BLOCKS)


@pytest.mark.parametrize(
    "entry", [np.nan, np.inf, -np.inf, 1.0001 * MOST_ENTRY, -1e15, 3e38], ids=str
)
def test_arrays_that_no_honest_run_sends_are_refused(entry: float) -> None:
    array = np.zeros((2, 3))
    array[1, 1] = entry
    with pytest.raises(OrderRefused, match="'a' has entries that are not finite, or above 10000"):
        named_arrays(["a"], [array])


@pytest.mark.parametrize(
    "array", [np.zeros(2, np.int64), np.zeros(2, bool), np.array(["x"]), np.zeros(2, complex)]
)
def test_arrays_of_other_types_are_refused(array: Any) -> None:
    with pytest.raises(OrderRefused, match="Send floating-point numbers"):
        named_arrays(["a"], [array])


def test_names_and_arrays_come_in_pairs() -> None:
    with pytest.raises(OrderRefused, match="1 arrays and 2 names"):
        named_arrays(["a", "b"], [np.zeros(2)])
    with pytest.raises(OrderRefused, match="came twice"):
        named_arrays(["a", "a"], [np.zeros(2), np.zeros(2)])


def test_good_arrays_are_read_in_fp32() -> None:
    found = named_arrays(["a", "b"], [np.full(2, MOST_ENTRY), np.zeros((0, 3), np.float16)])
    assert found["a"].dtype == found["b"].dtype == np.float32
    np.testing.assert_array_equal(found["a"], [MOST_ENTRY, MOST_ENTRY])


@pytest.mark.parametrize("rank", [1, 2, 7])
def test_arrays_of_the_models_shapes_pass_at_any_rank(rank: int) -> None:
    arrays = {A_NAME: np.zeros((rank, 3)), B_NAME: np.zeros((4, rank)), HEAD: np.zeros(5)}
    check_shapes({**arrays, **FOLDED}, OWN, rank)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (A_NAME, (3, 2)), (A_NAME, (2, 3, 1)), (A_NAME, ()), (A_NAME, (3, 3)), (B_NAME, (4, 3)),
        (B_NAME, (2,)), (HEAD, (6,)), (HEAD, (5, 1)), ("stranger", (1,)),
        ("blocks.1.fc.folded_A.weight", (3, 3)), ("blocks.0.fc.folded_B.weight", (4, 2)),
        ("blocks.0.fc.folded_B.weight", (4,)), ("blocks.0.fc.folded_A.weight", (3, 4)),
    ],
)  # fmt: skip
def test_arrays_of_another_model_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(OrderRefused, match=r"The (shape of|array)"):
        check_shapes({**OWN, **FOLDED, name: np.zeros(shape)}, OWN, 2)


def test_a_pair_beyond_the_weights_own_rank_is_refused() -> None:
    pair = {name: np.ones(shape) for name, shape in zip(FOLDED, [(4, 4), (4, 3)], strict=True)}
    with pytest.raises(OrderRefused, match="The shape of"):
        check_shapes({**OWN, **pair}, OWN, 2)


@pytest.mark.parametrize("name", list(OWN))
def test_a_missing_array_is_named(name: str) -> None:
    with pytest.raises(OrderRefused, match="is missing"):
        check_shapes({key: value for key, value in OWN.items() if key != name}, OWN, 2)


def test_an_order_checks_its_own_fields() -> None:
    with pytest.raises(InvalidValue, match="weighting"):
        Order(weighting="all")
