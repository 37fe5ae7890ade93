"""FedSA-LoRA's client: A is exchanged, all else that trains stays on the client's disk."""

from __future__ import annotations

import math
import shutil
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from numpy.typing import NDArray

from fedlora_flwr.clients.local_store import LocalStore
from fedlora_flwr.clients.numpy_client import LoRAClient
from fedlora_flwr.clients.trainer import LocalTrainer, process_trainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.state import state_folder
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import factor_of
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.privacy.calibration import calibrated_mechanism
from fedlora_flwr.privacy.ledger import Ledger
from fedlora_flwr.wire import OWN_LABELS
from tests.clients.asking import Asker
from tests.conftest import MakeConfig

Arrays = dict[str, NDArray[np.float32]]
CLIENT = "partition-000000"


def asker_of(config: RunConfig, run_id: int | None = None, client: int = 0) -> Asker:
    """Return an asker that sends what FedSA-LoRA's server does: A alone."""
    asker = Asker(config, run_id=run_id)
    asker.start = {name: array for name, array in asker.start.items() if factor_of(name) == "A"}
    with asker.grid.running():
        for node in asker.grid.get_node_ids():
            (reply,) = asker.grid.send_and_receive([Message(RecordDict(), node, "query")])
            if reply.content.config_records["config"]["client"] == f"partition-{client:06d}":
                asker.node = node
    return asker


def restarted(asker: Asker, client: int = 0) -> Asker:
    """Return the same client in the same run, with nothing left in memory."""
    process_trainer.cache_clear()
    again = asker_of(asker.config, asker.grid.run_id, client)
    again.start = asker.start
    return again


def train(asker: Asker, server_round: int = 1, **settings: Any) -> RecordDict:
    return asker.train("*", server_round, share="A", **settings)


def uploaded(content: RecordDict) -> Arrays:
    return {name: array.numpy() for name, array in content.array_records["arrays"].items()}


def kept(asker: Asker, client: str = CLIENT) -> Arrays:
    folder = state_folder(asker.config) / "local"
    return LocalStore(folder).recall(client, str(asker.grid.run_id))


def files(config: RunConfig) -> dict[str, bytes]:
    folder = state_folder(config) / "local"
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else {}


def rows(config: RunConfig) -> list[tuple[Any, ...]]:
    ledger = state_folder(config) / "ledger.sqlite"
    if not ledger.exists():
        return []
    with closing(sqlite3.connect(ledger)) as db:
        return db.execute("SELECT client, round FROM releases").fetchall()


def personal(asker: Asker) -> dict[str, Any]:
    reply = asker.message("evaluate", server_round=1, share="A")
    assert not reply.has_error(), reply.error.reason
    assert not reply.content.array_records
    figures = dict(reply.content.metric_records["metrics"])
    # Only a simulation adds it, and a device's figures are the others.
    assert 0 <= cast(float, figures.pop(OWN_LABELS)) <= 1
    return figures


def measured(config: RunConfig, *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate on the public test set with the given arrays over the start, on another model."""
    trainer = LocalTrainer.build(config)
    arrays = {**trainer.start}
    for layer in layers:
        arrays.update(layer)
    trainer.adapted.write(arrays)
    metrics = trainer.task.evaluate(trainer.adapted.model, trainer.task.test_records())
    return {**metrics, "num-examples": 1}


def equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return set(one) == set(other) and all(np.array_equal(one[n], other[n]) for n in one)


def test_only_a_leaves_and_the_rest_is_kept(make_config: MakeConfig) -> None:
    asker = asker_of(make_config())
    found = uploaded(train(asker))
    now = process_trainer(asker.config).adapted.read()
    assert set(found) == {name for name in now if factor_of(name) == "A"}
    assert equal(found, {name: now[name] for name in found})
    assert equal(kept(asker), {name: a for name, a in now.items() if factor_of(name) != "A"})
    # All of it has trained.
    start = process_trainer(asker.config).start
    assert not any(np.array_equal(now[name], start[name]) for name in now)
    assert len(files(asker.config)) == 1


def test_b_and_head_come_back_after_a_restart(make_config: MakeConfig) -> None:
    config = make_config()
    asker = asker_of(config)
    train(asker, 1)
    first = kept(asker)
    asker.start = {name: array + 0.01 for name, array in asker.start.items()}

    asker = restarted(asker)
    found = uploaded(train(asker, 2))

    # The same round on a trainer of its own, told by hand what was kept.
    trainer = LocalTrainer.build(config)
    records = trainer.task.client_records(0, config.num_clients)
    mechanism = calibrated_mechanism(config, len(records))
    plan, stream = ComponentPlan.parse("*"), (CLIENT, 2)
    arrays = {**first, **asker.start}
    expected = trainer.train(arrays, plan, records, mechanism, stream).arrays
    assert equal(found, {name: a for name, a in expected.items() if factor_of(name) == "A"})
    assert equal(kept(asker), {name: a for name, a in expected.items() if factor_of(name) != "A"})
    from_start = trainer.train({**trainer.start, **asker.start}, plan, records, mechanism, stream)
    assert not equal(found, {name: from_start.arrays[name] for name in found})


def test_a_restart_makes_no_difference(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    asker = asker_of(config, run_id=7)
    for server_round in (1, 2):
        straight = uploaded(train(asker, server_round))
    shutil.rmtree(state_folder(config))
    asker = asker_of(config, run_id=7)
    for server_round in (1, 2):
        asker = restarted(asker)
        interrupted = uploaded(train(asker, server_round))
    assert equal(straight, interrupted)


def test_another_client_and_another_run_start_from_the_backbone(make_config: MakeConfig) -> None:
    config = make_config()
    asker = asker_of(config)
    train(asker)
    bare = measured(config, asker.start)
    assert personal(asker) == measured(config, kept(asker), asker.start)
    assert personal(asker) != bare
    assert personal(asker_of(config, asker.grid.run_id, client=1)) == bare
    assert personal(asker_of(config, asker.grid.run_id + 1)) == bare

    other = asker_of(config, asker.grid.run_id, client=1)
    before = files(config)
    train(other)
    assert {name: files(config)[name] for name in before} == before
    assert len(files(config)) == 2
    assert not equal(kept(other, "partition-000001"), kept(asker))


def test_clients_in_one_process_do_not_mix(make_config: MakeConfig) -> None:
    config = make_config()

    def run(order: list[tuple[int, int]], run_id: int) -> dict[tuple[int, int], Arrays]:
        found = {}
        for client, server_round in order:
            asker = asker_of(config, run_id, client)
            found[client, server_round] = uploaded(train(asker, server_round))
        return found

    one_by_one = run([(0, 1), (0, 2), (1, 1), (1, 2)], 1)
    in_turn = run([(1, 1), (0, 1), (0, 2), (1, 2)], 2)
    for key, arrays in one_by_one.items():
        assert equal(arrays, in_turn[key]), key


@pytest.mark.parametrize("scope", ["run", "lifetime"])
def test_an_exhausted_client_keeps_nothing_new(make_config: MakeConfig, scope: str) -> None:
    config = make_config(max_rounds=1, ledger_scope=scope)
    asker = asker_of(config)
    train(asker, 1)
    before = files(config)
    if scope == "lifetime":
        asker = asker_of(config, asker.grid.run_id + 1)
    content = train(asker, 2)
    assert content.config_records["config"]["status"] == "budget-exhausted"
    assert not uploaded(content)
    assert files(config) == before
    assert len(rows(config)) == 1
    # What it had stays in use.
    assert personal(asker) == measured(config, kept(asker), asker.start)


class Watching(LocalStore):
    """Notes how many releases are in the ledger whenever something is kept."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(state_folder(config) / "local")
        self.config, self.seen = config, list[int]()

    def keep(
        self,
        client: str,
        run: str,
        arrays: Mapping[str, NDArray[np.float32]],
        server_round: int = 0,
    ) -> None:
        self.seen.append(len(rows(self.config)))
        super().keep(client, run, arrays, server_round)


def client_of(config: RunConfig, store: LocalStore | None) -> LoRAClient:
    trainer = process_trainer(config)
    records = trainer.task.client_records(0, config.num_clients)
    ledger = Ledger(state_folder(config) / "ledger.sqlite")
    return LoRAClient(trainer, records, ledger, CLIENT, "1", store=store)


def ask(config: RunConfig, server_round: int = 1) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of a fit as the bridge makes them."""
    start = process_trainer(config).start
    shared = {name: array for name, array in start.items() if factor_of(name) == "A"}
    settings = {"plan": "*", "share": "A", "server-round": server_round}
    return list(shared.values()), {**settings, "array-names": ",".join(shared)}


def test_the_release_is_in_the_ledger_before_anything_is_kept(make_config: MakeConfig) -> None:
    config = make_config()
    store = Watching(config)
    client = client_of(config, store)
    for server_round in (1, 2):
        client.fit(*ask(config, server_round))
    assert store.seen == [1, 2]


def test_a_release_that_cannot_be_kept_has_been_counted(make_config: MakeConfig) -> None:
    config = make_config()
    asker = asker_of(config)
    (state_folder(config)).mkdir(parents=True, exist_ok=True)
    (state_folder(config) / "local").write_text("no folder")
    asker.error(plan="*", server_round=1, share="A")
    assert rows(config) == [(CLIENT, 1)]


def test_a_release_that_cannot_be_counted_is_not_kept(make_config: MakeConfig) -> None:
    config = make_config()
    asker = asker_of(config)
    train(asker)
    before = files(config)
    with closing(sqlite3.connect(state_folder(config) / "ledger.sqlite")) as db:
        db.execute(
            "CREATE TRIGGER full BEFORE INSERT ON releases BEGIN SELECT RAISE(ABORT, 'full'); END"
        )
    asker.error(plan="*", server_round=2, share="A")
    assert files(config) == before
    assert rows(config) == [(CLIENT, 1)]


def test_a_damaged_file_costs_nothing_and_is_not_replaced(make_config: MakeConfig) -> None:
    config = make_config()
    asker = asker_of(config)
    train(asker)
    (path,) = (state_folder(config) / "local").iterdir()
    path.write_bytes(b"damaged")
    assert "readable safetensors" in asker.error(plan="*", server_round=2, share="A")
    assert "readable safetensors" in asker.error("evaluate", server_round=2, share="A")
    assert path.read_bytes() == b"damaged"
    assert len(rows(config)) == 1


def test_a_client_without_a_store_refuses_and_spends_nothing(make_config: MakeConfig) -> None:
    config = make_config()
    client = client_of(config, None)
    parameters, settings = ask(config)
    with pytest.raises(InvalidValue, match="LocalStore"):
        client.fit(parameters, settings)
    with pytest.raises(InvalidValue, match="LocalStore"):
        client.evaluate(parameters, settings)
    assert rows(config) == []


def test_personal_evaluation_reads_public_records_only(make_config: MakeConfig) -> None:
    config = make_config()
    asker = asker_of(config)
    train(asker)
    metrics = personal(asker)
    assert set(metrics) == {"loss", "accuracy", "num-examples"}
    assert metrics == measured(config, kept(asker), asker.start)
    # Even where the run allows figures on private records.
    open_config = make_config(report_unprotected_metrics=True)
    open_asker = asker_of(open_config, asker.grid.run_id)
    assert personal(open_asker) == metrics
    assert len(rows(config)) == 1


def test_private_records_stay_closed_without_a_shared_factor(make_config: MakeConfig) -> None:
    config = make_config()
    asker = asker_of(config)
    train(asker)
    asker.start = dict(process_trainer(config).start)
    assert "report-unprotected-metrics" in asker.error("evaluate", server_round=1)
    assert "report-unprotected-metrics" in asker.error("evaluate", server_round=1, share="")


def test_nothing_is_kept_where_nothing_has_to_stay(make_config: MakeConfig) -> None:
    config = make_config(epsilon=math.inf)
    Asker(config).train("*", 1)
    assert not (state_folder(config) / "local").exists()


def test_the_servers_backbone_is_checked_as_before(make_config: MakeConfig) -> None:
    config = make_config()
    asker = asker_of(config)
    settings: dict[str, Any] = {"plan": "*", "server_round": 1, "share": "A"}
    assert "frozen weights differ" in asker.error(fingerprint="0" * 32, **settings)
    assert not files(config)


def test_what_the_server_sends_counts_before_what_was_kept(make_config: MakeConfig) -> None:
    config = make_config()
    asker = asker_of(config)
    train(asker)
    bias = np.linspace(-9, 9, 10, dtype=np.float32)
    asker.start = {**asker.start, "head.bias": bias}
    assert personal(asker) == measured(config, kept(asker), asker.start)
    assert personal(asker) != measured(config, asker.start, kept(asker))


def test_a_name_that_is_no_factor_is_refused(make_config: MakeConfig) -> None:
    config = make_config()
    assert "share" in asker_of(config).error(plan="*", server_round=1, share="a")
    assert not files(config)
    assert not rows(config)
