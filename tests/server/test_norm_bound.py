"""Updates of the real trainer against the bound that the server works out from public numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chi2, poisson  # type: ignore[import-untyped]

from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import FederationAborted, InvalidValue, SuspectReply
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.privacy.clip_weights import ClipWeights
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.postprocessing.filters import FILTERS, make_filter
from fedlora_flwr.server.norm_bound import CHANCE, NormBound, adam_steps, answers, unknown
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.server.strategy import build_strategy
from fedlora_flwr.simulations.runner import prepare_run, run_in_process
from fedlora_flwr.strategies.replies import Upload
from fedlora_flwr.wire.order import Order
from tests.conftest import MakeConfig

Arrays = dict[str, NDArray[np.float32]]
SIGMA, STEPS, BATCH = 8.0, 4, 16
ADAM = {"lr-a": 0.01, "lr-b": 0.01, "lr-head": 0.01}

# Settings, plan, and how far the bound is at most above the typical norm of each part.
CASES: Mapping[str, tuple[dict[str, Any], str, float]] = {
    "sgd on B": ({}, "B", 3.0),
    "sgd on A": ({}, "A", 3.0),
    "sgd by step": ({}, "B/A", 3.0),
    "momentum": ({"momentum": 0.9}, "B/A", 3.0),
    "weights": ({"clip-weight-head": 0.1, "clip-weight-a": 3.0}, "*", 3.0),
    "weight decay": ({"weight-decay": 0.3}, "*", 3.0),
    **{f"filter {name}": ({"filter": name}, "*", 3.0) for name in FILTERS if name != "none"},
    "preconditioned, A frozen": ({"precondition": True}, "B", 3.0),
    "preconditioned, B frozen": ({"precondition": True}, "A", 3.0),
    "preconditioned, filtered": ({"precondition": True, "filter": "binomial"}, "B", 3.0),
    # The other factor moves where the server cannot see it.
    "preconditioned by step": ({"precondition": True, "filter": "binomial"}, "B/A", 20.0),
    "adamw": ({"optimizer": "adamw", **ADAM}, "*", 3.5),
    "adamw, filtered": ({"optimizer": "adamw", "filter": "ema", **ADAM}, "B/A", 3.0),
    "adamw-plain": ({"optimizer": "adamw-plain", "weight-decay": 0.5, **ADAM}, "*", 3.0),
}


@pytest.fixture(scope="module")
def trainer() -> LocalTrainer:
    common = {"local-steps": STEPS, "batch-size": BATCH, "reproducible": True, "device": "cpu"}
    return LocalTrainer.build(RunConfig.of({"largest-noise": SIGMA, **common}))


def moved_start(trainer: LocalTrainer) -> Arrays:
    """As in the middle of a run, where B is not zero."""
    rng = np.random.default_rng(0)
    return {
        name: (array + 0.1 * rng.standard_normal(array.shape)).astype(np.float32)
        for name, array in trainer.start.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_honest_uploads_are_within_the_bound_and_not_far_below(
    name: str, trainer: LocalTrainer
) -> None:
    own, text, most = CASES[name]
    config = RunConfig.of(trainer.config.items(), own)
    records = trainer.task.client_records(0, 10)
    weights = ClipWeights.configured(config)
    mechanism = Mechanism(SIGMA, config.clip_norm, BATCH, len(records), weights=weights)
    start, order, bound = moved_start(trainer), Order(1, text), NormBound(config)
    sent: Arrays = {}
    for seed in range(3):
        made = replace(trainer, config=config)
        sent = made.train(start, ComponentPlan.parse(text), records, mechanism, (seed,)).arrays
        for norm, limit in bound.measured(order, start, sent, SIGMA).values():
            assert norm < limit < most * norm
    bound.check(order, start, Upload("one", sent, 1.0, {}))
    for part in {name.split(".")[-2] for name in sent}:  # lora_A, lora_B, head
        far = {
            n: start[n] + 100 * (x - start[n]) if f".{part}" in f".{n}" else x
            for n, x in sent.items()
        }
        with pytest.raises(SuspectReply, match=r"its update of (A|B|head) has norm"):
            bound.check(order, start, Upload("one", far, 1.0, {}))


def test_the_bound_of_plain_sgd_is_near_the_exact_tails() -> None:
    for sigma, slack in ((50.0, 1.05), (0.0, 1.06)):
        config = RunConfig(
            local_steps=4, batch_size=100, clip_norm=0.5, lr_b=0.2, largest_noise=sigma
        )
        name, shape = "blocks.0.fc.lora_B.weight", (200, 10)
        start = {name: np.zeros(shape), "blocks.0.fc.lora_A.weight": np.zeros((10, 5))}
        order, sent = Order(1, "B"), {name: np.ones(shape)}
        ((norm, found),) = NormBound(config).measured(order, start, sent, sigma).values()
        assert norm == pytest.approx(math.sqrt(2000))
        records = poisson.isf(CHANCE / 2, 4 * 100)
        noise = sigma * math.sqrt(4 * chi2.isf(CHANCE / 2, 2000))
        exact = 0.2 * 0.5 / 100 * (records + noise)
        assert exact <= found <= slack * exact


@pytest.mark.parametrize("name", FILTERS)
def test_no_filter_lengthens_what_it_reads(name: str) -> None:
    if name in ("ema", "doppler"):
        answer, left = answers(settings(), 1.0, name, 6)
        # A round moves as far as without the filter, in other steps.
        assert answer.sum() == pytest.approx(6.0)
        assert left == 1.0
        return
    made = make_filter(name)
    matrix = made("fc.lora_A.weight", torch.eye(17, dtype=torch.float64))
    assert float(torch.linalg.matrix_norm(matrix, 2)) <= 1 + 1e-12


def settings(**own: Any) -> Any:
    from fedlora_flwr.privacy.postprocessing.optimizer import OptimizerSettings

    return OptimizerSettings(**{"name": "sgd", "lr_a": 1.0, "lr_b": 1.0, "lr_head": 1.0, **own})


def test_answers_of_momentum_decay_and_pull_are_those_by_hand() -> None:
    answer, left = answers(settings(momentum=0.5), 0.1, "none", 3)
    np.testing.assert_allclose(answer, [0.1 * 1.75, 0.1 * 1.5, 0.1])
    assert left == 1.0
    answer, left = answers(settings(weight_decay=2.0), 0.1, "none", 3)
    np.testing.assert_allclose(answer, [0.1 * 0.8**2, 0.1 * 0.8, 0.1])
    assert left == pytest.approx(0.8**3)
    answer, left = answers(settings(proximal_mu=2.0), 0.1, "none", 3)
    np.testing.assert_allclose(answer, [0.1 * 0.8**2, 0.1 * 0.8, 0.1])
    assert left == 1.0


@pytest.mark.parametrize("name", ["adamw", "adamw-plain"])
def test_no_gradients_move_adam_farther_than_its_bound(name: str) -> None:
    rng, steps = np.random.default_rng(1), 12
    most = adam_steps(settings(name=name), steps)
    gradients = rng.standard_normal((steps, 4000)) * 10 ** rng.uniform(-2, 2, (1, 4000))
    gradients[:, :2000] += rng.uniform(-5, 5, (1, 2000))
    parameter = torch.nn.Parameter(torch.zeros(4000, dtype=torch.float64))
    optimizer: Any = settings(name=name).build([{"params": [parameter], "lr": 1.0}])
    if name == "adamw":
        optimizer.noise_variance[parameter] = 1.0
    before = np.zeros(4000)
    for step in range(steps):
        parameter.grad = torch.from_numpy(gradients[step])
        optimizer.step()
        now = parameter.detach().numpy().copy()
        largest = float(np.abs(now - before).max())
        assert largest <= most[step] * (1 + 1e-9)
        assert step > 3 or largest > 0.9 * most[step]
        before = now


def test_a_stated_noise_counts_where_it_lowers_the_weight() -> None:
    config = RunConfig(weighting="inverse-noise", batch_size=32, clip_norm=0.5)
    bound = NormBound(config)
    assert bound.noise_of((32 / (4.0 * 0.5)) ** 2) == pytest.approx(4.0)
    assert NormBound(replace(config, largest_noise=3.0)).noise_of(1e-3) == 3.0
    assert NormBound(replace(config, weighting="uniform", largest_noise=3.0)).noise_of(1) == 3.0


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ({}, "does not know how much noise"),
        ({"largest-noise": 1.0}, ""),
        ({"weighting": "inverse-noise"}, ""),
        ({"optimizer": "adamw"}, ""),
        ({"largest-noise": 1.0, "clip-norm": math.inf, "epsilon": math.inf}, "clip-norm = inf"),
        ({"largest-noise": 1.0, "precondition": True, "ridge": 0.0}, "ridge = 0"),
        ({"optimizer": "adamw", "local-steps": 9000}, "local-steps is above"),
        (
            {
                "largest-noise": 1.0,
                "precondition": True,
                "strategy": "fedprox",
                "fedprox.proximal-mu": 0.1,
            },
            "combined with a proximal term",
        ),
    ],
)
def test_the_bound_is_the_default_where_it_follows_from_public_numbers(
    own: dict[str, Any], reason: str
) -> None:
    config = RunConfig.of(own)
    assert reason in unknown(config)
    assert bool(reason) == bool(unknown(config))
    robust = build_strategy(config).robust
    assert (robust.limit is None) == bool(reason)
    assert robust.means
    assert build_strategy(replace(config, robust="none")).robust.limit is None
    both = build_strategy(replace(config, robust="median")).robust
    assert both.words == ("median" if reason else "norm-bound, median")


def test_a_simulation_knows_its_clients_noise_and_leaves_it_out_of_the_recipe(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(num_rounds=1)
    prepared = prepare_run(config)
    assert prepared.largest_noise == max(m.noise_multiplier for m in prepared.mechanisms) > 0
    run_dir = RunDirectory(tmp_path / "run")
    summary = run_in_process(prepared, run_dir, lambda row: None)
    assert (summary["robust"], summary["suspects"], summary["failures"]) == ("norm-bound", {}, 0)
    # On devices with budgets of their own the number would be wrong.
    assert "largest-noise = inf" in (run_dir.path / "config.toml").read_text("utf-8")


def test_what_cannot_be_kept_is_refused_before_the_run(make_config: MakeConfig) -> None:
    # Earlier runs on the same records may have fixed more noise.
    lifetime = make_config(ledger_scope="lifetime", robust="norm-bound")
    with pytest.raises(
        InvalidValue, match=r"robust = 'norm-bound' .* does not know how much noise"
    ):
        prepare_run(lifetime)
    with pytest.raises(FederationAborted, match="3 clients were asked, but robust = 'krum' "):
        prepare_run(make_config(robust="krum"))


@pytest.mark.parametrize("rule", ["norm-bound", "trimmed-mean", "median", "krum"])
def test_a_secure_sum_refuses_what_needs_single_uploads(rule: str, make_config: MakeConfig) -> None:
    own = {"trust-model": "secure-sum", "sample-rate": 0.1, "local-steps": 1}
    with pytest.raises(InvalidValue, match=r"robust = .*the server sees no single upload"):
        make_config(robust=rule, **{key.replace("-", "_"): value for key, value in own.items()})


@pytest.mark.parametrize("strategy", ["flora", "fedex-lora", "flexlora"])
def test_a_method_that_needs_each_upload_refuses_a_rule_and_takes_the_bound(strategy: str) -> None:
    with pytest.raises(InvalidValue, match=f"robust = 'krum' .*'{strategy}' needs each upload"):
        RunConfig.of({"strategy": strategy, "robust": "krum"})
    config = RunConfig.of({"strategy": strategy, "robust": "norm-bound", "largest-noise": 2.0})
    assert build_strategy(config).robust.limit is not None
