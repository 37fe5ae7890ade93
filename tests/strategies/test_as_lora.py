"""AS-LoRA's server: which factor each block trains, and what it makes of the updates."""

from __future__ import annotations

import itertools
import json
import random
from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlora_flwr.algebra.gains import Estimate
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import Layout, factor_of
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.strategies import ASLoRA, Upload
from fedlora_flwr.strategies.choices import Choice, Scores
from tests.strategies.duels import Duels, known, layout_of
from tests.strategies.resumed import assert_goes_on_bit_for_bit
from tests.strategies.tiny import NAMES, Tiny, arrays_of, record_of, reply_of, start_arrays

LAYOUT = Layout.of(NAMES)


class Run:
    """A run of tiny clients that move at random, with the details of all rounds."""

    def __init__(self, strategy: ASLoRA, rounds: int, clients: int = 3) -> None:
        self.strategy, self.rounds = strategy, rounds
        self.details: list[dict[str, Any]] = []
        self.tiny = Tiny(clients)

        def keep(server_round: int, _: Any) -> None:
            if server_round and strategy.last_round is not None:
                self.details.append(strategy.last_round.details)

        with self.tiny.grid() as grid:
            self.result = strategy.start(grid, record_of(start_arrays()), rounds, evaluate_fn=keep)

    @property
    def modes(self) -> list[str]:
        return [
            next(str(a.plan) for a in self.tiny.asked if a.server_round == server_round)
            for server_round in range(1, self.rounds + 1)
        ]


@pytest.mark.parametrize(
    ("rounds", "warm"), [(1, 0), (9, 0), (10, 1), (19, 1), (20, 2), (35, 3), (50, 5)]
)
def test_the_warm_up_is_a_tenth_of_the_rounds_alike_in_all_blocks_and_b_first(
    rounds: int, warm: int
) -> None:
    modes = Run(ASLoRA(), rounds, 2).modes
    assert modes[:warm] == [("AA" if server_round % 2 else "BB") for server_round in range(warm)]
    assert modes[0] == "BB"
    if warm < 2 <= rounds:
        # What has no score yet is next.
        assert modes[1] == "AA"


def test_a_factor_without_a_score_is_chosen_in_its_block_alone() -> None:
    strategy = ASLoRA()
    strategy.scores = [known(0.0, 9.0), known(9.0, 0.0), Scores(), known(9.0, -9.0)]
    del strategy.scores[0].gains["A"], strategy.scores[1].gains["B"]
    for scores in strategy.scores[:2]:
        for factor in "AB":
            scores.gains.setdefault(factor, Scores().gains[factor])
    plans = {str(strategy.plan(1, layout_of(4))) for _ in range(3)}
    assert plans <= {"ABBA", "ABBB"}
    assert [choice.z for choice in strategy._choices[:3]] == [None] * 3


def test_curvature_counts_in_the_last_rounds_and_once_both_are_known() -> None:
    strategy = ASLoRA(curvature="secant", curvature_rounds=2, warm_up=0.0)
    strategy.num_rounds, strategy.scores = 10, [known(1.0, 0.0, 0.0)]
    strategy.scores[0].bends["A"].add(Estimate(0.75, 0.0), 0, 0.9)

    def values(server_round: int) -> list[float]:
        pair = strategy._before(server_round, strategy.scores[0])
        return [estimate.value for estimate in pair if estimate is not None]

    assert values(9) == [1.0, 0.0]  # What curvature costs B is not known.
    strategy.scores[0].bends["B"].add(Estimate(-0.5, 0.0), 0, 0.9)
    assert values(8) == [1.0, 0.0]
    assert values(9) == [0.25, 0.5]
    strategy.curvature_rounds = 0
    assert values(1) == [0.25, 0.5]


def test_a_rate_of_its_own_enters_the_gain() -> None:
    """The same squared update at ten times the rate came from a gradient of a tenth."""
    duels = Duels(lambda _: (4.0, 4.0), 0.1, blocks=3)
    strategy = duels.run(2, lr_a=0.5, lr_b=0.05, local_steps=5, warm_up=1.0)
    for scores in strategy.scores:
        a, b = strategy._before(3, scores)
        assert a is not None
        assert b is not None
        assert a.value == pytest.approx(4 / 2.5, rel=0.2)
        assert b.value == pytest.approx(4 / 0.25, rel=0.2)
    still = Duels(lambda _: (0.0, 4.0), 0.1, blocks=3).run(20, lr_a=0.0)
    assert all(scores.gains["A"].mean == 0 for scores in still.scores)


def test_rates_are_those_of_their_schedules() -> None:
    strategy = ASLoRA(
        lr_a=2.0, lr_b=1.0, lr_schedule="linear:0", lr_schedule_b="exponential:0.5", local_steps=3
    )
    strategy.num_rounds = 3

    assert [strategy.rate("A", t) for t in (1, 2, 3)] == pytest.approx([6.0, 3.0, 0.0])
    assert [strategy.rate("B", t) for t in (1, 2, 3)] == pytest.approx([3.0, 1.5, 0.75])


def test_a_rate_that_falls_from_round_to_round_leaves_the_gradient_what_it_is() -> None:
    class Falling(ASLoRA):
        def rate(self, factor: str, server_round: int) -> float:
            return float(2.0**-server_round)

    strategy, duels = Falling(curvature="secant", warm_up=0.0), Duels(lambda _: (0, 0), 0.0)
    strategy.num_rounds, duels.blocks = 4, 2
    zeros = {n: np.zeros((2, 24) if factor_of(n) == "A" else (24, 2)) for n in duels.layout.names}
    rng = np.random.default_rng(0)
    for server_round in (1, 2, 3):
        # A gradient of norm 3 moves by less and less.
        duels.squares = lambda t: (0.0, 9.0 * 4.0**-t)
        duels.noise = 1e-4 * 2.0**-server_round
        plan = strategy.plan(server_round, duels.layout)
        strategy._choices = [Choice("B")] * 2
        uploads = duels.uploads(rng, server_round, ComponentPlan.parse("BB"))
        assert plan.steps
        strategy.aggregate(server_round, zeros, uploads)
    for scores in strategy.scores:
        assert scores.gains["B"].mean == pytest.approx(9.0, rel=1e-3)
        assert scores.bends["B"].mean == pytest.approx(0.0, abs=1e-2)
        next_one = strategy._before(4, scores)[1]
        assert next_one is not None
        assert next_one.value == pytest.approx(9.0 / 16, rel=1e-2)


def test_fixed_and_tied_are_the_axes_that_they_are_called() -> None:
    layout = layout_of(5)
    fixed = ASLoRA(selection="fixed")
    fixed.num_rounds = 10
    assert [str(fixed.plan(t, layout)) for t in (1, 2, 3, 10)] == ["B" * 5, "A" * 5] * 2
    arrays = [f"blocks.0.{name}.lora_{f}.weight" for name in ("q", "v", "o") for f in "AB"]
    layers = ASLoRA(groups="layer")
    assert len(Layout.of(arrays, layers.blocks).blocks) == 3
    assert ASLoRA(groups="layer", blocks=r"blocks\.\d+").blocks == r"blocks\.\d+"
    duels = Duels(lambda _: (1.0, 1.0), 1.0, blocks=5)
    strategy = duels.run(40, groups="tied")
    assert len(strategy.scores) == 1
    assert {len(set(plan)) for plan in duels.plans} == {1}
    assert {plan[0] for plan in duels.plans[4:]} == {"A", "B"}


@pytest.mark.parametrize("clients", [1, 4])
def test_one_upload_or_a_secure_sum_is_scored_from_round_to_round(clients: int) -> None:
    """Where the server sees one mean alone, each factor trains twice before it has a score."""
    duels = Duels(lambda _: (9.0, 0.0), 0.05, blocks=20, clients=1)
    uploads = duels.uploads

    def masked(*args: Any) -> list[Upload]:
        (mean,) = uploads(*args)
        return [Upload(f"client-{i}", mean.arrays, 1.0, {}) for i in range(clients)]

    duels.uploads = masked  # type: ignore[method-assign,assignment]
    duels.run(20, warm_up=0.0)
    assert duels.plans[:4] == ["B" * 20, "B" * 20, "A" * 20, "A" * 20]
    assert duels.shares(4).mean() > 0.9


# What a run says.


def test_a_round_tells_scores_errors_leads_and_chances() -> None:
    run = Run(ASLoRA(), 12)
    assert all(
        list(d) == ["scores", "score_errors", "scores_A", "scores_B", "z", "chance_A"]
        for d in run.details
    )
    assert run.details[0]["z"] == run.details[0]["chance_A"] == [None, None]
    assert run.details[0]["scores_A"] == [None, None]
    assert run.details[0]["scores_B"] == run.details[0]["scores"]
    for details in run.details[2:]:
        for z, chance in zip(details["z"], details["chance_A"], strict=True):
            # Unseen changes bring a chance nearer to one half, never to the other side.
            assert abs(chance - 0.5) <= abs(min(max(NormalDist().cdf(z), 0.02), 0.98) - 0.5)
            assert (chance - 0.5) * z >= 0
    json.dumps(run.details, allow_nan=False)


def test_a_score_is_the_mean_product_of_the_clients_updates() -> None:
    run = Run(ASLoRA(local_steps=2, lr_b=0.5), 1)
    start = start_arrays()
    sent = [arrays_of(content.array_records["arrays"]) for content in run.tiny.uploads]
    for block in range(2):
        name = f"blocks.{block}.fc.lora_B.weight"
        moved = [arrays[name] - start[name] for arrays in sent]
        products = [float((a * b).sum()) for a, b in itertools.permutations(moved, 2)]
        expected = np.mean(products) / (0.5 * 2)
        assert run.details[0]["scores"][block] == pytest.approx(expected, rel=1e-5)


def test_the_seed_decides_and_asking_twice_changes_nothing() -> None:
    first, again, other = (Run(ASLoRA(seed=seed), 30) for seed in (3, 3, 4))
    assert first.modes == again.modes
    assert first.details == again.details
    assert first.modes != other.modes
    strategy = first.strategy
    assert [str(strategy.plan(25, LAYOUT)) for _ in range(3)] == [
        str(strategy.plan(25, LAYOUT))
    ] * 3


def test_a_second_run_of_the_same_strategy_starts_anew() -> None:
    strategy = ASLoRA(seed=3)
    first, second = Run(strategy, 20), Run(strategy, 20)
    assert second.modes == first.modes
    assert second.details == first.details


def test_replies_in_any_order_give_the_same_bits_and_scores() -> None:
    results = set()
    for seed in range(4):
        tiny, strategy = Tiny(6), ASLoRA()
        with tiny.grid() as grid:
            messages = strategy.configure_train(1, record_of(start_arrays()), ConfigRecord(), grid)
            replies = list(grid.send_and_receive(list(messages)))
            random.Random(seed).shuffle(replies)
            arrays, _ = strategy.aggregate_train(1, replies)
        assert arrays is not None
        bits = b"".join(array.data for array in arrays.values())
        results.add((bits, str(strategy.scores)))
    assert len(results) == 1


# Arrays.


def test_frozen_factors_keep_their_bits_across_a_round() -> None:
    run = Run(ASLoRA(seed=2), 24, clients=3)
    states = [run.tiny.received(r) for r in range(1, 25)] + [arrays_of(run.result.arrays)]
    for modes, (before, after) in zip(run.modes, itertools.pairwise(states), strict=True):
        moved = {name for name in NAMES if before[name].tobytes() != after[name].tobytes()}
        trained = {f"blocks.{i}.fc.lora_{mode}.weight" for i, mode in enumerate(modes)}
        assert moved == trained | {"head.bias"}
    for content, asked in zip(run.tiny.uploads, run.tiny.asked, strict=True):
        names = {n for n in content.array_records["arrays"] if factor_of(n)}
        assert names == {f"blocks.{i}.fc.lora_{m}.weight" for i, m in enumerate(str(asked.plan))}
    assert len(set(run.modes)) == 4


@given(
    modes=st.text("AB", min_size=1, max_size=6),
    clients=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_mean_is_exact_in_every_block_for_any_modes(
    modes: str, clients: int, seed: int
) -> None:
    rng, layout = np.random.default_rng(seed), layout_of(len(modes))
    current: dict[str, NDArray[Any]] = {
        name: rng.normal(size=(3, 5) if factor_of(name) == "A" else (4, 3)) for name in layout.names
    }
    plan = ComponentPlan.uniform(modes)
    uploads = [
        Upload(
            f"client-{k}",
            {n: current[n] + rng.normal(size=current[n].shape) for n in layout.trained(plan, 1)},
            float(rng.uniform(0.1, 5)),
            {},
        )
        for k in range(clients)
    ]
    after = ASLoRA().aggregate(1, current, uploads)

    weights = np.array([u.weight for u in uploads]) / sum(u.weight for u in uploads)
    for block, mode in enumerate(modes):
        b, a = layout.pair(f"blocks.{block}.fc")
        models = [{**current, **u.arrays} for u in uploads]
        mean = sum(w * m[b] @ m[a] for w, m in zip(weights, models, strict=True))
        np.testing.assert_allclose(after[b] @ after[a], mean, rtol=0, atol=1e-12)
        frozen = a if mode == "B" else b
        assert after[frozen].tobytes() == current[frozen].tobytes()


# What goes wrong.


def test_layers_in_no_named_block_are_refused_with_the_way_to_name_them() -> None:
    strange = {name.replace("blocks.", "stages_"): array for name, array in start_arrays().items()}
    with (
        Tiny(2).grid() as grid,
        pytest.raises(InvalidValue, match="Set blocks to a regular expression"),
    ):
        ASLoRA().start(grid, record_of(strange), num_rounds=1)

    tiny = Tiny(2, lambda asked: reply_of(asked.trained(), asked.partition))
    strategy = ASLoRA(blocks=r"stages_\d+")
    with tiny.grid() as grid:
        messages = list(strategy.configure_train(1, record_of(strange), ConfigRecord(), grid))
    assert messages[0].content.config_records["config"]["plan"] == "BB"


def test_blocks_of_several_layers_share_a_mode_and_a_score() -> None:
    arrays = {
        f"blocks.{i}.{layer}.lora_{f}.weight": np.ones((1, 1), np.float32)
        for i in range(3)
        for layer in ("attn.qkv", "mlp.fc1")
        for f in "AB"
    }
    tiny, strategy = Tiny(2), ASLoRA(seed=1)
    with tiny.grid() as grid:
        strategy.start(grid, record_of(arrays), num_rounds=8)
    assert {len(str(asked.plan)) for asked in tiny.asked} == {3}
    assert len(strategy.scores) == 3
    for asked, content in zip(tiny.asked, tiny.uploads, strict=True):
        expected = {
            f"blocks.{i}.{layer}.lora_{mode}.weight"
            for i, mode in enumerate(str(asked.plan))
            for layer in ("attn.qkv", "mlp.fc1")
        }
        assert set(content.array_records["arrays"]) == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("curvature", "hessian"), ("curvature_rounds", -1), ("selection", "greedy"),
        ("groups", "head"), ("temperature", 0.0), ("explore", 0.6), ("score_decay", 1.0),
        ("score_drift", -1.0), ("warm_up", -0.1),
    ],
)  # fmt: skip
def test_what_an_argument_cannot_be_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(InvalidValue, match=f"{key.replace('_', '-')} = {value!r}"):
        ASLoRA(**{key: value})


@pytest.mark.parametrize(("curvature", "cohort"), [("none", 1), ("secant", 3)])
def test_a_saved_run_goes_on_bit_for_bit(curvature: str, cohort: int) -> None:
    """One upload is compared with the round before, and the secant with the last movement."""
    make = partial(ASLoRA, curvature=curvature, warm_up=0.0)
    assert_goes_on_bit_for_bit(make, saved_after=6, cohort=cohort)
