"""Rules in place of the mean, in federations whose arithmetic fits in a line."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedlora_flwr.algebra.robust import krum, squared_distances
from fedlora_flwr.config.sections.federation import RULES
from fedlora_flwr.errors import FederationAborted, InvalidValue, SuspectReply
from fedlora_flwr.layout import factor_of
from fedlora_flwr.strategies import ASLoRA, DPLoRA, FedLoRA, FedSVD, FLoRA, RoLoRA
from fedlora_flwr.strategies.replies import Upload
from fedlora_flwr.strategies.robust import Robust
from fedlora_flwr.wire.order import Order
from tests.strategies.tiny import Asked, Tiny, arrays_of, record_of, reply_of, start_arrays

Arrays = dict[str, NDArray[np.float32]]
CLIENTS, BAD = 7, 6


def one_bad(asked: Asked) -> RecordDict:
    """Let the last client send its update times 100, and all of them differ in weight."""
    trained = asked.trained()
    if asked.partition == BAD:
        trained = {n: asked.arrays[n] + 100 * (x - asked.arrays[n]) for n, x in trained.items()}
    return reply_of(trained, asked.partition, weight=1.0 + asked.partition)


def after(rule: str, strategy: FedLoRA, rounds: int = 1) -> tuple[Arrays, Tiny, FedLoRA]:
    tiny = Tiny(CLIENTS, one_bad)
    strategy.robust = Robust(rule)
    found = tiny.run(strategy, rounds)
    return arrays_of(found.arrays), tiny, strategy


def uploads_of(tiny: Tiny) -> list[Arrays]:
    by_client = zip(tiny.asked, tiny.uploads, strict=True)
    ordered = sorted(by_client, key=lambda pair: pair[0].partition)
    return [arrays_of(content.array_records["arrays"]) for _, content in ordered]


def expected_of(
    rule: str, stack: NDArray[np.float64], weights: Sequence[float]
) -> NDArray[np.float64]:
    # A fifth of seven clients, rounded up, is two.
    cut = {"trimmed-mean": 2, "median": 3}[rule]
    order = np.argsort(stack, axis=0)[cut : CLIENTS - cut]
    kept, shares = np.take_along_axis(stack, order, axis=0), np.asarray(weights)[order]
    return np.asarray((kept * shares).sum(axis=0) / shares.sum(axis=0))


@pytest.mark.parametrize("weighting", ["uniform", "size"])
@pytest.mark.parametrize("rule", ["trimmed-mean", "median"])
def test_a_rule_takes_the_place_of_the_mean_of_each_active_array(rule: str, weighting: str) -> None:
    found, tiny, strategy = after(rule, RoLoRA(weighting=weighting))
    sent, begin = uploads_of(tiny), start_arrays()
    weights = [1.0 + i if weighting == "size" else 1.0 for i in range(CLIENTS)]
    for name, array in found.items():
        if factor_of(name) == "A":  # Frozen in a first round.
            assert array.tobytes() == begin[name].tobytes()
            continue
        stack = np.stack([upload[name] for upload in sent]).astype(np.float64)
        np.testing.assert_allclose(array, expected_of(rule, stack, weights), rtol=1e-5)
    assert strategy.last_round is not None
    assert strategy.last_round.suspects == ["partition-000006"]
    assert len(strategy.last_round.uploads) == CLIENTS


def test_krum_chooses_for_each_factor_on_its_own() -> None:
    def bad_in_a(asked: Asked) -> RecordDict:
        trained = asked.trained()
        for name in trained:
            if asked.partition == 0 and factor_of(name) == "A":
                trained[name] = trained[name] + 50
        return reply_of(trained, asked.partition)

    tiny, strategy = Tiny(CLIENTS, bad_in_a), DPLoRA()
    strategy.robust = Robust("krum")
    found, begin = arrays_of(tiny.run(strategy).arrays), start_arrays()
    sent = uploads_of(tiny)
    for part in ("A", "B", None):
        names = [n for n in begin if factor_of(n) == part]
        rows = [np.concatenate([(u[n] - begin[n]).ravel() for n in names]) for u in sent]
        kept = krum(squared_distances(rows), 2)
        assert part != "A" or 0 not in kept
        for name in names:
            mean = np.mean([sent[i][name].astype(np.float64) for i in kept], axis=0)
            np.testing.assert_allclose(found[name], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", [ASLoRA, FedSVD])
def test_methods_that_read_a_mean_go_on_with_a_rules_result(
    method: type[FedLoRA], rule: str
) -> None:
    found, _, strategy = after(rule, method(seed=1), rounds=3)
    honest = max(float(np.abs(array).max()) for array in start_arrays().values())
    assert all(np.abs(array).max() < 4 * honest + 8 for array in found.values())
    assert strategy.last_round is not None
    assert "partition-000006" in strategy.last_round.suspects


def test_without_a_rule_the_mean_is_as_it_was() -> None:
    plain = Tiny(CLIENTS, one_bad)
    expected = arrays_of(plain.run(RoLoRA()).arrays)
    found, *_ = after("none", RoLoRA())
    assert {n: a.tobytes() for n, a in found.items()} == {
        n: a.tobytes() for n, a in expected.items()
    }


class Refusing:
    """A limit that one client is beyond."""

    def check(self, order: Order, current: Arrays, upload: Upload) -> None:
        assert (order.server_round, order.plan) == (1, "B")
        assert set(upload.arrays) < set(current)
        if upload.client == "partition-000006":
            raise SuspectReply("its update is too long")


def test_an_upload_beyond_the_limit_is_a_failure_and_its_client_a_suspect() -> None:
    tiny, strategy = Tiny(CLIENTS, one_bad), RoLoRA()
    strategy.robust = Robust(limit=Refusing())  # type: ignore[arg-type]
    tiny.run(strategy)
    report = strategy.last_round
    assert report is not None
    assert report.failures == ["partition-000006: its update is too long"]
    assert report.suspects == ["partition-000006"]
    assert len(report.uploads) == CLIENTS - 1


@pytest.mark.parametrize("rule", RULES)
def test_uploads_that_the_limit_refuses_count_as_those_that_may_be_bad(rule: str) -> None:
    """Three of ten clients may be bad. Krum would need nine uploads if all three were left."""

    class RefusesThree:
        def check(self, order: Order, current: Arrays, upload: Upload) -> None:
            if upload.client < "partition-000003":
                raise SuspectReply("its update is too long")

    tiny, strategy = Tiny(10), RoLoRA()
    strategy.robust = Robust(rule, share=0.3, limit=RefusesThree())  # type: ignore[arg-type]
    found = arrays_of(tiny.run(strategy).arrays)
    report = strategy.last_round
    assert report is not None
    assert report.suspects == [f"partition-{i:06d}" for i in range(3)]
    if rule != "median":  # Nobody else may be bad, so the others are averaged.
        honest = uploads_of(tiny)[3:]
        for name in honest[0]:
            mean = np.mean([upload[name].astype(np.float64) for upload in honest], axis=0)
            np.testing.assert_allclose(found[name], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rule", "clients", "least"), [("krum", 6, 7), ("median", 2, 3)])
def test_too_few_clients_are_told_before_any_is_asked(rule: str, clients: int, least: int) -> None:
    tiny, strategy = Tiny(clients), RoLoRA()
    strategy.robust = Robust(rule)
    with pytest.raises(FederationAborted, match=rf"{clients} clients were asked, .* least {least}"):
        tiny.run(strategy)
    assert tiny.asked == []


def test_too_few_uploads_end_the_run_at_the_round() -> None:
    def silent(asked: Asked) -> RecordDict:
        if asked.partition < 3:
            raise RuntimeError
        return one_bad(asked)

    tiny, strategy = Tiny(CLIENTS, silent), RoLoRA()
    strategy.robust = Robust("trimmed-mean")
    with pytest.raises(FederationAborted, match=r"4 of 7 uploads can be used, .* at least 5"):
        tiny.run(strategy)


def test_a_method_that_needs_each_upload_refuses_a_rule_before_any_client_is_asked() -> None:
    tiny, strategy = Tiny(CLIENTS), FLoRA()
    strategy.robust = Robust("median")
    with pytest.raises(FederationAborted, match="this method's aggregation needs each upload"):
        tiny.run(strategy)
    assert tiny.asked == []


def test_flowers_clipping_of_whole_updates_is_refused_beside_a_rule() -> None:
    tiny, strategy = Tiny(CLIENTS), DPLoRA()
    strategy.robust = Robust("median")
    with tiny.grid() as grid, pytest.raises(FederationAborted, match="not the mean of uploads"):
        list(
            strategy.configure_train(
                1, record_of(start_arrays()), ConfigRecord({"clipping_norm": 1.0}), grid
            )
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rule": "mean"}, "robust = 'mean' cannot be used"),
        ({"share": 0.5}, "robust-share = 0.5 cannot be used"),
    ],
)
def test_what_a_rule_cannot_be(given: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        Robust(**given)  # type: ignore[arg-type]
