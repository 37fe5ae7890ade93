"""AS-LoRA's server: which factor each block trains, and what becomes of its scores."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlora_flwr.errors import FederationAborted, InvalidValue
from fedlora_flwr.plan import ComponentPlan, Layout, factor_of
from fedlora_flwr.strategies import ASLoRA, Upload
from tests.strategies.tiny import NAMES, Asked, Tiny, arrays_of, record_of, reply_of, start_arrays

LAYOUT = Layout.of(NAMES)
Scorer = Callable[[Asked, int, str], float]


def layout_of(blocks: int) -> Layout:
    return Layout.of(
        [f"blocks.{i}.fc.lora_{factor}.weight" for i in range(blocks) for factor in "AB"]
    )


def arrays_for(blocks: int) -> dict[str, NDArray[Any]]:
    return {name: np.ones((1, 1), np.float32) for name in layout_of(blocks).names}


def scoring(score: Scorer) -> Callable[[Asked], RecordDict]:
    """Answer as the plan says, with a score a block of its active factor."""

    def answer(asked: Asked) -> RecordDict:
        blocks = len(Layout.of(asked.arrays).blocks)
        modes = str(asked.plan)
        assert len(modes) == blocks
        content = reply_of(asked.trained(), asked.partition, weight=float(1 + 9 * asked.partition))
        scores = [score(asked, block, mode) for block, mode in enumerate(modes)]
        content.metric_records["metrics"]["scores"] = scores
        return content

    return answer


def drawn(asked: Asked, block: int, mode: str) -> float:
    """Score at random, by client, round, block and factor."""
    rng = np.random.default_rng((asked.partition, asked.server_round, block, mode == "A"))
    return float(rng.exponential() * (2 if block % 2 else 1))


class Run:
    """A run with the details of all rounds."""

    def __init__(
        self,
        strategy: ASLoRA,
        rounds: int,
        blocks: int = 2,
        clients: int = 2,
        score: Scorer = drawn,
    ) -> None:
        self.strategy, self.rounds = strategy, rounds
        self.details: list[dict[str, Any]] = []
        self.tiny = Tiny(clients, scoring(score))
        arrays = start_arrays() if blocks == 2 else arrays_for(blocks)

        def keep(server_round: int, _: Any) -> None:
            if server_round and strategy.last_round is not None:
                self.details.append(strategy.last_round.details)

        with self.tiny.grid() as grid:
            self.result = strategy.start(grid, record_of(arrays), rounds, evaluate_fn=keep)

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
    modes = Run(ASLoRA(), rounds).modes
    assert modes[:warm] == [("AA" if server_round % 2 else "BB") for server_round in range(warm)]
    assert modes[0] == "BB"
    if warm < 2 <= rounds:
        # What has no score yet is next.
        assert modes[1] == "AA"


def test_a_warm_up_is_never_a_round_short() -> None:
    for rounds in range(10, 2000, 10):
        strategy = ASLoRA()
        strategy.num_rounds, strategy.scores = rounds, {"A": [9.0] * 2, "B": [0.0] * 2}
        last = rounds // 10
        assert str(strategy.plan(last, LAYOUT)) == ("BB" if last % 2 else "AA")
        after = {str(strategy.plan(last + i, LAYOUT)) for i in range(40, 60)}
        assert after == {"AA"}  # With all the lead at A and a cold draw.


def test_a_factor_without_a_score_is_chosen_in_its_block_alone() -> None:
    strategy = ASLoRA()
    strategy.num_rounds = 10
    strategy.scores = {"A": [None, 9.0, None, 9.0], "B": [9.0, None, None, 1e-9]}
    layout = layout_of(4)
    plans = [str(strategy.plan(server_round, layout)) for server_round in range(60, 90)]
    assert set(plans) == {"ABBA"}


def test_a_score_of_zero_is_a_score() -> None:
    strategy = ASLoRA()
    strategy.num_rounds = 10
    strategy.scores = {"A": [0.0] * 50, "B": [0.0] * 50}
    plan = str(strategy.plan(60, layout_of(50)))
    assert set(plan) == {"A", "B"}


def test_moving_averages_of_active_factors_and_bits_of_the_others() -> None:
    run = Run(ASLoRA(), 40, clients=3)
    averages: dict[str, list[float | None]] = {"A": [None, None], "B": [None, None]}
    frozen = 0
    for server_round, (modes, details) in enumerate(zip(run.modes, run.details, strict=True), 1):
        asked = [a for a in run.tiny.asked if a.server_round == server_round]
        for block, mode in enumerate(modes):
            mean = sum(drawn(a, block, mode) for a in asked) / 3
            assert details["scores"][block] == pytest.approx(mean, rel=1e-12)
            before = averages[mode][block]
            averages[mode][block] = mean if before is None else 0.9 * before + 0.1 * mean
            other = "B" if mode == "A" else "A"
            held = run.details[server_round - 2] if server_round > 1 else {}
            # The very same number, and not one that was computed again.
            assert (
                details[f"scores_{other}"][block] == held.get(f"scores_{other}", [None] * 2)[block]
            )
            frozen += 1
        for factor in "AB":
            assert details[f"scores_{factor}"] == [
                None if value is None else pytest.approx(value, rel=1e-12)
                for value in averages[factor]
            ]
    assert frozen == 80
    assert len(set(run.modes[4:])) == 4  # All pairs of modes were seen.


def test_the_first_value_is_copied_and_the_next_weighs_a_tenth() -> None:
    values = iter([4.0, 1.0, 8.0])
    seen: dict[tuple[int, str], float] = {}

    def score(asked: Asked, block: int, mode: str) -> float:
        if (asked.server_round, mode) not in seen:
            seen[asked.server_round, mode] = next(values)
        return seen[asked.server_round, mode]

    run = Run(ASLoRA(), 30, score=lambda a, b, m: score(a, b, m) if a.server_round < 4 else 0.5)
    assert run.modes[:3] == ["BB", "AA", "BB"]
    assert run.details[0] == {"scores": [4.0] * 2, "scores_A": [None] * 2, "scores_B": [4.0] * 2}
    assert run.details[1] == {"scores": [1.0] * 2, "scores_A": [1.0] * 2, "scores_B": [4.0] * 2}
    assert run.details[2]["scores_B"] == pytest.approx([0.9 * 4 + 0.1 * 8] * 2, rel=1e-14)
    assert run.details[2]["scores_A"] == [1.0] * 2


def test_the_mean_is_clamped_at_zero_and_not_each_clients_score() -> None:
    table = {0: (1.0, -3.0), 1: (-0.5, 1.0)}
    run = Run(ASLoRA(), 1, score=lambda asked, block, _: table[asked.partition][block])
    assert run.details[0]["scores"] == [0.25, 0.0]
    assert run.details[0]["scores_B"] == [0.25, 0.0]


def test_scores_have_the_weights_of_the_arrays() -> None:
    strategy = ASLoRA(weighting="size")
    run = Run(strategy, 1, score=lambda asked, block, _: float(asked.partition + block))
    # Weights 1 and 10.
    assert run.details[0]["scores"] == pytest.approx([10 / 11, (1 + 20) / 11], rel=1e-12)


def test_details_of_a_round_are_its_own() -> None:
    run = Run(ASLoRA(), 12)
    before = [str(details) for details in run.details]
    again = Run(ASLoRA(), 6)
    # Twelve rounds and six have another warm-up; their first round is the same.
    assert before[0] == str(again.details[0])
    assert len({str(details["scores_B"]) for details in run.details}) > 2
    assert all(set(d) == {"scores", "scores_A", "scores_B"} for d in run.details)


# Draws.


def chance(of_a: float, of_b: float, temperature: float) -> float:
    """Return p(A), written down from the paper."""
    lead = (of_a - of_b) / (abs(of_a) + abs(of_b) + 1e-8)
    return 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, lead / temperature))))


def share_of_a(
    server_round: int, of_a: float, of_b: float, blocks: int = 3000, seeds: int = 20
) -> float:
    layout, found = layout_of(blocks), 0
    for seed in range(seeds):
        strategy = ASLoRA(seed=seed)
        strategy.num_rounds = 1000  # The warm-up is 100 rounds.
        strategy.scores = {"A": [of_a] * blocks, "B": [of_b] * blocks}
        found += str(strategy.plan(server_round, layout)).count("A")
    return found / (blocks * seeds)


@pytest.mark.parametrize(
    ("after", "temperature"),
    [(1, 0.95), (10, 0.95**10), (20, 0.95**20), (44, 0.95**44), (45, 0.1), (300, 0.1)],
)
def test_the_temperature_falls_from_the_warm_up_on_to_a_tenth(
    after: int, temperature: float
) -> None:
    # A lead of (3 - 1) / (3 + 1), made smaller where it is cold.
    of_a = 3.0 if after < 30 else 1.2
    found, expected = share_of_a(100 + after, of_a, 1.0), chance(of_a, 1.0, temperature)
    assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / 60000)


@pytest.mark.parametrize(
    ("of_a", "of_b"), [(0.0, 0.0), (1e-9, 0.0), (0.0, 1e-9), (1.0, 2.0), (1e6, 1.1e6), (5.0, 5.0)]
)
def test_the_chance_of_a_is_a_sigmoid_of_the_relative_lead(of_a: float, of_b: float) -> None:
    found = share_of_a(110, of_a, of_b, 3000, 7)
    expected = chance(of_a, of_b, 0.95**10)
    assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / 21000) + 1e-12


def test_draws_over_whole_runs_follow_an_independent_simulation() -> None:
    """Follow the moving averages of real runs; sum up how far draws are from their chances."""
    surprise = variance = 0.0
    by_chance: dict[int, list[tuple[float, bool]]] = {}
    for seed in range(4):
        run = Run(ASLoRA(seed=seed, min_train_nodes=1, min_available_nodes=1), 50, 12, 1)
        averages: dict[tuple[str, int], float] = {}
        for server_round, modes in enumerate(run.modes, 1):
            (asked,) = (a for a in run.tiny.asked if a.server_round == server_round)
            for block, mode in enumerate(modes):
                if server_round > 5:
                    temperature = max(0.1, 0.95 ** (server_round - 5))
                    p = chance(averages["A", block], averages["B", block], temperature)
                    surprise += (mode == "A") - p
                    variance += p * (1 - p)
                    by_chance.setdefault(int(p * 5), []).append((p, mode == "A"))
                score = drawn(asked, block, mode)
                before = averages.get((mode, block), score)
                averages[mode, block] = 0.9 * before + 0.1 * score
    assert abs(surprise) < 4 * math.sqrt(variance)
    assert len(by_chance) >= 4
    for draws in by_chance.values():
        gap = sum(a - p for p, a in draws)
        assert abs(gap) < 4.5 * math.sqrt(sum(p * (1 - p) for p, _ in draws)) + 1


def test_blocks_and_rounds_are_drawn_independently() -> None:
    blocks, rounds = 60, 80
    strategy, layout = ASLoRA(seed=1), layout_of(blocks)
    strategy.num_rounds = 10
    strategy.scores = {"A": [1.0] * blocks, "B": [1.0] * blocks}
    table = np.array(
        [[m == "A" for m in str(strategy.plan(50 + r, layout))] for r in range(rounds)]
    )
    signs = 2.0 * table - 1
    for one, other in ((signs[1:], signs[:-1]), (signs[:, 1:], signs[:, :-1])):
        assert abs((one * other).mean()) < 4 / math.sqrt(one.size)


def test_the_seed_decides_and_asking_twice_changes_nothing() -> None:
    first, again, other = (Run(ASLoRA(seed=seed), 30) for seed in (3, 3, 4))
    assert first.modes == again.modes
    assert first.details == again.details
    assert first.modes[:3] == other.modes[:3]
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
    def wide(asked: Asked, block: int, mode: str) -> float:
        return 10.0 ** (asked.partition * 3) / 3

    results = set()
    for seed in range(4):
        tiny, strategy = Tiny(6, scoring(wide)), ASLoRA()
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
            scores=tuple(rng.normal(size=len(modes))),
        )
        for k in range(clients)
    ]
    strategy = ASLoRA()
    strategy._plan = plan
    strategy.scores = {"A": [1.0] * len(modes), "B": [2.0] * len(modes)}
    after = strategy.aggregate(1, current, uploads)

    weights = np.array([u.weight for u in uploads]) / sum(u.weight for u in uploads)
    for block, mode in enumerate(modes):
        b, a = layout.pair(f"blocks.{block}.fc")
        models = [{**current, **u.arrays} for u in uploads]
        mean = sum(w * m[b] @ m[a] for w, m in zip(weights, models, strict=True))
        np.testing.assert_allclose(after[b] @ after[a], mean, rtol=0, atol=1e-12)
        frozen = a if mode == "B" else b
        assert after[frozen].tobytes() == current[frozen].tobytes()
        assert strategy.scores["A" if mode == "B" else "B"][block] == (1.0 if mode == "B" else 2.0)


# What goes wrong.


def unscored(asked: Asked) -> RecordDict:
    return reply_of(asked.trained(), asked.partition)


def test_clients_that_score_nothing_end_the_run_with_the_reason() -> None:
    with pytest.raises(
        FederationAborted, match=r"0 of 2.*partition-000000: it sent 0 scores for 2 bl"
    ):
        Tiny(2, unscored).run(ASLoRA())


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_scores_ends_the_run(count: int) -> None:
    def answer(asked: Asked) -> RecordDict:
        content = unscored(asked)
        content.metric_records["metrics"]["scores"] = [1.0] * count
        return content

    with pytest.raises(FederationAborted, match=f"sent {count} scores for 2 blocks"):
        Tiny(2, answer).run(ASLoRA())


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [1.0, math.inf], 3.0])
def test_a_client_with_unusable_scores_is_left_out(bad: Any) -> None:
    def answer(asked: Asked) -> RecordDict:
        content = scoring(lambda *_: 2.0)(asked)
        if asked.partition == 1:
            content.metric_records["metrics"]["scores"] = bad
        return content

    strategy = ASLoRA()
    Tiny(3, answer).run(strategy)
    report = strategy.last_round
    assert report is not None
    assert [u.client for u in report.uploads] == ["partition-000000", "partition-000002"]
    assert len(report.failures) == 1
    assert "scores" in report.failures[0]
    assert report.details["scores"] == [2.0, 2.0]


def test_layers_in_no_named_block_are_refused_with_the_way_to_name_them() -> None:
    strange = {name.replace("blocks.", "stages_"): array for name, array in start_arrays().items()}
    with Tiny(2).grid() as grid, pytest.raises(InvalidValue, match="set blocks = "):
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
    tiny = Tiny(2, scoring(drawn))
    strategy = ASLoRA(seed=1)
    with tiny.grid() as grid:
        strategy.start(grid, record_of(arrays), num_rounds=8)
    assert {len(str(asked.plan)) for asked in tiny.asked} == {3}
    assert all(len(scores) == 3 for scores in strategy.scores.values())
    for asked, content in zip(tiny.asked, tiny.uploads, strict=True):
        expected = {
            f"blocks.{i}.{layer}.lora_{mode}.weight"
            for i, mode in enumerate(str(asked.plan))
            for layer in ("attn.qkv", "mlp.fc1")
        }
        assert set(content.array_records["arrays"]) == expected


@pytest.mark.parametrize("curvature", ["none", "secant"])
def test_every_message_asks_for_scores(curvature: str) -> None:
    with Tiny(2).grid() as grid:
        messages = list(
            ASLoRA(curvature=curvature).configure_train(
                1, record_of(start_arrays()), ConfigRecord(), grid
            )
        )
    assert {m.content.config_records["config"]["curvature"] for m in messages} == {curvature}


def test_an_unknown_curvature_is_refused() -> None:
    with pytest.raises(InvalidValue, match="curvature = 'hessian'"):
        ASLoRA(curvature="hessian")
