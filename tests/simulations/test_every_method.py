"""Every method and option in one real run of digits with noise, in this process."""

from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from peft import PeftModel
from safetensors.numpy import load_file

from fedlora_flwr.client_app import client_fn
from fedlora_flwr.clients.bridge import bridge
from fedlora_flwr.clients.trainer import process_trainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.layout import factor_of, is_folded
from fedlora_flwr.privacy.postprocessing.filters import FILTERS
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.server.serve import run_federation
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies import STRATEGIES
from fedlora_flwr.tasks.registry import build_task
from tests.conftest import MakeConfig
from tests.server.support import SUMMARY

every_method = pytest.mark.parametrize("method", sorted(STRATEGIES))
# What trains in the two rounds, and what the server replaces though it did not train.
TRAINED = {
    "ffa-lora": ("B", "B"),
    "ffa-seeds": ("B", "B"),
    "fedsvd": ("B", "B"),
    "rolora": ("B", "A"),
    "as-lora": ("B", "A"),
    "head-only": ("", ""),
    "mr-mtl": ("B", "B"),
}
REWRITTEN = ("fedsvd", "ffa-seeds")
EXTRA = {
    "as-lora": {"scores", "score_errors", "scores_A", "scores_B", "z", "chance_A"},
    "fedsa-lora": {"accuracy_own_labels"},
    "mr-mtl": {"accuracy_own_labels"},
}
ROW = {
    "round",
    "loss",
    "accuracy",
    "plan",
    "epsilon_max",
    "clients_asked",
    "clients_used",
    "clients_absent",
    "declined",
    "failures",
    "suspects",
    "bytes_down",
    "bytes_up",
    "bytes_up_adapters",
    "bytes_plain",
    "seconds",
}
AGREEMENT = {"agreement", "signal", "spread"}
# Uploads of different ranks are not compared; where models stay with the clients, no mean of their
# products is what the run is for.
COMPARED = {"flexlora": set[str](), "fedsa-lora": AGREEMENT, "mr-mtl": AGREEMENT}


class Session:
    """A finished run and what its clients got and sent."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self.run_dir = config, RunDirectory(folder)
        self.downloads: list[dict[str, Any]] = []
        self.uploads: list[dict[str, Any]] = []
        app = ClientApp(client_fn, mods=[partial(_watch, self), bridge])
        with LocalGrid(app, config.num_clients, config.items()).running() as grid:
            self.summary = run_federation(grid, config, self.run_dir)

    @property
    def rounds(self) -> list[dict[str, Any]]:
        return self.run_dir.rows("rounds")

    def adapter(self) -> dict[str, Any]:
        arrays = load_file(self.run_dir.adapter / "adapter_model.safetensors")
        return {name.removeprefix("base_model.model."): array for name, array in arrays.items()}


def _watch(
    session: Session, message: Message, context: Context, call_next: ClientAppCallable
) -> Message:
    training = message.metadata.message_type == "train"
    if training:
        session.downloads.append(_arrays(message))
    reply = call_next(message, context)
    if training and not reply.has_error():
        session.uploads.append(_arrays(reply))
    return reply


def _arrays(message: Message) -> dict[str, Any]:
    return {n: a.numpy() for r in message.content.array_records.values() for n, a in r.items()}


@every_method
def test_a_run_trains_what_the_method_says_and_leaves_a_loadable_adapter(
    method: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"client_ranks": "2,4,1"} if method == "flexlora" else {}
    config = make_config(strategy=method, **options)
    session = Session(config, tmp_path / "run")

    summary, rows = session.summary, session.rounds
    assert set(summary) >= SUMMARY
    assert (summary["status"], summary["strategy"]) == ("completed", method)
    assert (summary["rounds_done"], summary["failures"], summary["declined"]) == (2, 0, 0)
    assert 0 < summary["epsilon_max"] <= config.epsilon
    assert summary["final_accuracy"] == rows[-1]["accuracy"]
    assert [row["clients_used"] for row in rows[1:]] == [3, 3]
    for row in rows[1:]:
        compared = COMPARED.get(method, {*AGREEMENT, "mean_error"})
        assert set(row) == ROW | EXTRA.get(method, set()) | compared
        assert math.isfinite(row["loss"])
    for key in ("bytes_up", "bytes_down", "bytes_up_adapters"):
        assert summary[key] == sum(row[key] for row in rows[1:])
        assert bool(summary[key]) == (method != "head-only" or key != "bytes_up_adapters")
    assert len(session.run_dir.rows("clients")) == 6

    check_uploads(session, method)
    if method not in ("flexlora", "fedsa-lora"):
        check_frozen(session, method)
    check_adapter(session, method)


def check_uploads(session: Session, method: str) -> None:
    assert len(session.uploads) == 6
    for server_round, arrays_sent in enumerate((session.uploads[:3], session.uploads[3:])):
        factors = TRAINED.get(method, ("AB", "AB"))[server_round]
        expected = {*factors, None} if method != "fedsa-lora" else {"A"}
        for arrays in arrays_sent:
            assert {factor_of(name) for name in arrays} == expected
            assert not any(is_folded(name) for name in arrays)
            assert all(np.isfinite(array).all() for array in arrays.values())


def check_frozen(session: Session, method: str) -> None:
    """Follow the global arrays from round to round, in the clients' own downloads."""
    states = [session.downloads[0], session.downloads[3]]
    for before, after in itertools.pairwise(states):
        moved = {
            factor_of(name)
            for name, array in before.items()
            if not is_folded(name) and not np.array_equal(array, after[name])
        }
        expected = {*TRAINED.get(method, ("AB", "AB"))[0], None}
        # FLoRA's B is zero again after each round, and that of a new seed is still zero.
        expected -= {"B"} if method in ("flora", "ffa-seeds") else set()
        assert moved == (expected | {"A"} if method in REWRITTEN else expected)
        assert any(map(is_folded, after)) == STRATEGIES[method].folds
    for first, *others in (session.downloads[:3], session.downloads[3:]):
        for other in others:
            assert all(np.array_equal(array, other[name]) for name, array in first.items())


def check_adapter(session: Session, method: str) -> None:
    task = build_task(session.config.task, session.config)
    loaded = PeftModel.from_pretrained(task.build_model(), str(session.run_dir.adapter)).eval()
    measured = task.evaluate(loaded, task.test_records())
    last = session.rounds[-1]
    if method == "mr-mtl":
        # The figures are those of the clients' models; the adapter is their mean.
        assert measured["loss"] != pytest.approx(last["loss"], rel=1e-5)
        return
    if method == "fedsa-lora":
        # The figures are those of the clients' models; the server has A alone.
        start = process_trainer(session.config).start
        for name, array in session.adapter().items():
            assert np.array_equal(array, start[name]) == (factor_of(name) != "A")
        assert measured["loss"] == pytest.approx(session.rounds[0]["loss"], rel=1e-6)
        assert measured["accuracy"] == session.rounds[0]["accuracy"]
        return
    assert measured["accuracy"] == last["accuracy"]
    assert measured["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert measured["loss"] != pytest.approx(session.rounds[0]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "method",
    ["as-lora", "ffa-seeds", "fedsvd", "flexlora", "flora", "fedex-lora", "fedsa-lora", "mr-mtl"],
)
def test_the_seed_repeats_a_run(method: str, make_config: MakeConfig, tmp_path: Path) -> None:
    options: dict[str, Any] = {"client_ranks": "2,4,1"} if method == "flexlora" else {}
    config = make_config(strategy=method, **options)
    results = set()
    for name in ("first", "again"):
        process_trainer.cache_clear()
        session = Session(config, tmp_path / name)
        content = (session.run_dir.adapter / "adapter_model.safetensors").read_bytes()
        results.add((content, *(row["loss"] for row in session.rounds)))
    assert len(results) == 1


OPTIONS: list[dict[str, Any]] = [
    {"strategy": "as-lora", "curvature": "secant"},
    {"strategy": "as-lora", "groups": "layer", "selection": "argmax"},
    {"strategy": "as-lora", "weighting": "inverse-noise"},
    {"strategy": "la-lora", "precondition": True, "filter": "binomial"},
    {"strategy": "fedex-lora", "precondition": True, "filter": "ema", "rslora": True},
    {"strategy": "flora", "optimizer": "adamw", "weighting": "size", "train_head": False},
    {"strategy": "fedsa-lora", "train_head": False},
    {"strategy": "flexlora", "client_ranks": "1,3", "rslora": True, "train_head": False},
    {"strategy": "fedsvd", "momentum": 0.9, "microbatch_size": 5, "lora_dropout": 0.1},
    *({"strategy": "la-lora", "optimizer": "adamw", "filter": name} for name in FILTERS),
]


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda options: "-".join(map(str, options.values()))
)
def test_options_run_and_give_finite_figures(
    options: dict[str, Any], make_config: MakeConfig, tmp_path: Path
) -> None:
    rates = {"lr_a": 0.01, "lr_b": 0.01, "lr_head": 0.01} if "optimizer" in options else {}
    short = {"num_rounds": 1, "local_steps": 4}
    session = Session(make_config(**{**short, **rates, **options}), tmp_path / "run")
    assert session.summary["status"] == "completed"
    assert session.summary["failures"] == 0
    assert all(math.isfinite(row["loss"]) for row in session.rounds)
    assert all(np.isfinite(array).all() for array in session.adapter().values())
    assert session.rounds[1]["loss"] != session.rounds[0]["loss"]
    if options["strategy"] == "as-lora":
        assert all(math.isfinite(s) for r in session.rounds[1:] for s in r["scores"])
        assert all(e > 0 for r in session.rounds[1:] for e in r["score_errors"])
    if not options.get("train_head", True):
        # A head that does not train is exported as it was at the start, and does not travel.
        exported, start = (
            session.adapter(),
            build_task("digits", session.config).build_model().state_dict(),
        )
        head = {name: array for name, array in exported.items() if not factor_of(name)}
        assert head.keys() == {"head.weight", "head.bias"}
        assert all(np.array_equal(array, start[name].numpy()) for name, array in head.items())
        assert all(factor_of(name) for arrays in session.downloads for name in arrays)
