"""A whole run whose clients mask: real strategy, messages, clients and files, in one process."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextvars import Context as Variables
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from numpy.typing import NDArray

from fedlora_flwr.clients.handler import answer_message
from fedlora_flwr.clients.local_round import LocalRound
from fedlora_flwr.clients.sum_exchange import SumExchange
from fedlora_flwr.clients.sum_messages import stage_of
from fedlora_flwr.clients.sum_store import SumStore
from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import ClientFailed, OrderRefused
from fedlora_flwr.privacy.ledger import Ledger
from fedlora_flwr.secure_sum.grid import opened
from fedlora_flwr.secure_sum.party import Shared
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.server.serve import run_federation
from fedlora_flwr.server.sum_step import SumStep
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.wire import OPEN_SUM, SEAL_SHARES, SHOW_KEYS, UPLOAD
from fedlora_flwr.wire.identity import acting_for
from fedlora_flwr.wire.order import Order
from fedlora_flwr.wire.records import read_training
from tests.conftest import MakeConfig

CLIENTS = 4
SUM: dict[str, Any] = {
    "trust_model": "secure-sum", "sample_rate": 0.1, "local_steps": 1, "num_clients": CLIENTS,
    "num_rounds": 2, "dropouts": 1, "delta": 5e-4, "epsilon": 8, "strategy": "ffa-lora",
    "eval_every": 2, "min_completion": 0, "sum_records": 1500, "least_shares": 2,
}  # fmt: skip
Gone = Mapping[str, tuple[int, ...]]


class Fleet:
    """Four clients, each with its own folder, which take no word of a simulation."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.trainer = LocalTrainer.build(config)
        self.stores = [SumStore(folder / str(i)) for i in range(CLIENTS)]
        identities = [store.identity().public_key().public_bytes_raw() for store in self.stores]
        peers = folder / "peers.txt"
        peers.write_text("# ours\n" + "".join(f"{i.hex()} hospital\n" for i in identities))
        self.config = replace(config, peers=str(peers))
        self.ledger = Ledger(folder / "ledger.sqlite")
        self.run = "one"
        self.seen: dict[str, list[int]] = defaultdict(list)

    def client(self, place: int) -> LocalRound:
        name = f"client-{place}"
        return LocalRound(
            self.trainer,
            self.trainer.task.client_records(place, CLIENTS),
            self.ledger,
            name,
            self.run,
            exchange=SumExchange(self.config, name, self.run, self.stores[place]),
        )

    def answer(self, place: int, message: Message) -> Message:
        return Variables().run(self._answer, place, message)

    def _answer(self, place: int, message: Message) -> Message:
        with acting_for(1):
            return answer_message(lambda: self.client(place), message, f"client-{place}")

    def app(self, gone: Gone) -> Callable[[Message, Context], Message]:
        def app(message: Message, context: Context) -> Message:
            place, stage = int(context.node_config["partition-id"]), stage_of(message)
            self.seen[stage].append(place)
            if place in gone.get(stage, ()):
                raise RuntimeError("gone")
            return self.answer(place, message)

        return app

    def steps(self) -> list[int]:
        with self.ledger._file.reading() as db:
            rows = dict(db.execute("SELECT client, SUM(steps) FROM releases GROUP BY client"))
        return [rows.get(f"client-{place}", 0) for place in range(CLIENTS)]


@pytest.fixture
def fleet(make_config: MakeConfig, tmp_path: Path) -> Fleet:
    return Fleet(make_config(**SUM), tmp_path / "devices")


def run(fleet: Fleet, folder: Path, gone: Gone) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    config = fleet.config
    with LocalGrid(fleet.app(gone), CLIENTS, config.items()).running() as grid:
        run_dir = RunDirectory(folder)
        summary = run_federation(grid, config, run_dir)
    return [dict(row) for row in run_dir.rows("rounds")[1:]], summary


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """What clients put under their masks, and what the server opened."""
    under: list[Mapping[str, NDArray[np.uint32]]] = []
    found: list[Mapping[str, NDArray[np.int64]]] = []
    masked, total = Shared.masked, SumStep.total

    def watch_masked(self: Shared, shares: Any, kept: Any) -> Any:
        under.append(shares)
        return masked(self, shares, kept)

    def watch_total(self: SumStep, *given: Any) -> Any:
        result = total(self, *given)
        found.append(dict(result))
        return result

    monkeypatch.setattr(Shared, "masked", watch_masked)
    monkeypatch.setattr(SumStep, "total", watch_total)
    return under, found


def test_the_opened_sum_is_that_of_what_the_clients_masked(
    fleet: Fleet, tmp_path: Path, sums: tuple[list[Any], list[Any]]
) -> None:
    rows, summary = run(fleet, tmp_path / "run", {})

    under, found = sums
    assert [(row["shares"], row["opened"]) for row in rows] == [(4, True)] * 2
    assert len(under) == 8
    assert len(found) == 2
    for number, total in enumerate(found):
        parts = under[4 * number : 4 * number + 4]
        for name, array in total.items():
            expected = opened(np.sum([p[name] for p in parts], axis=0, dtype=np.uint32))
            assert np.array_equal(array, expected)
    assert summary["remarks"]["secure sum"].startswith("masked")
    card = (tmp_path / "run" / "adapter" / "README.md").read_text("utf-8")
    assert "| trust model | `secure-sum`, masked by the clients." in card
    assert summary["status"] == "completed"
    assert summary["failures"] == 0
    assert fleet.steps() == [2, 2, 2, 2]


@pytest.mark.parametrize("stage", [SHOW_KEYS, SEAL_SHARES, UPLOAD, OPEN_SUM])
def test_one_client_may_be_gone_at_any_message_and_two_may_not(
    fleet: Fleet, tmp_path: Path, stage: str
) -> None:
    rows, _ = run(fleet, tmp_path / "one", {stage: (2,)})

    assert [row["opened"] for row in rows] == [True, True]
    gone = "partition-000002: ", "client-2: "
    assert all(line.startswith(gone) for row in rows for line in row["failures"])
    spent = fleet.steps()
    assert spent == [2, 2, 2 if stage == OPEN_SUM else 0, 2]

    fleet.run = "two"
    rows, summary = run(fleet, tmp_path / "two", {stage: (0, 2)})

    assert [row["opened"] for row in rows] == [False, False]
    assert summary["final_accuracy"] == summary["initial_accuracy"]
    # Only who uploaded has spent; if too few agreed, nobody was asked to train.
    again = {SHOW_KEYS: (), SEAL_SHARES: (), UPLOAD: (1, 3), OPEN_SUM: (0, 1, 2, 3)}[stage]
    assert fleet.steps() == [spent[i] + 2 * (i in again) for i in range(CLIENTS)]
    assert stage not in (SHOW_KEYS, SEAL_SHARES) or len(fleet.seen[UPLOAD]) == 6


class Server:
    """A server that leads a fleet through a round by hand, and may say what it likes."""

    def __init__(self, fleet: Fleet, order: Order) -> None:
        self.fleet, self.order = fleet, order

    def send(self, place: int, **changes: Any) -> Any:
        order = replace(self.order, **changes)
        config = ConfigRecord({**order.to_config()})
        arrays = self.fleet.trainer.start if order.stage in ("", UPLOAD) else {}
        record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
        content = RecordDict({"arrays": record, "config": config})
        with acting_for(1):
            message = Message(content, place + 1, MessageType.TRAIN)
        return read_training(self.fleet.answer(place, message).content)

    def cards(self) -> bytes:
        return b"".join(self.send(i, stage=SHOW_KEYS).packet for i in range(CLIENTS))

    def sealed(self, cards: bytes) -> list[bytes]:
        return [self.send(i, stage=SEAL_SHARES, packet=cards).packet for i in range(CLIENTS)]

    def for_client(self, sealed: list[bytes], place: int) -> bytes:
        return b"".join(packet[148 * place : 148 * place + 148] for packet in sealed)


@pytest.fixture
def server(fleet: Fleet) -> Server:
    return Server(fleet, Order(1, "B", cohort=4, sum_noise=20.0, grid_norm=2**16))


def test_an_upload_leaves_once_and_in_its_turn_only(server: Server) -> None:
    with pytest.raises(OrderRefused, match="without masks"):
        server.send(0)
    with pytest.raises(OrderRefused, match="twice or in another order"):
        server.send(0, stage=UPLOAD, packet=bytes(4 * 148))
    sealed = server.sealed(server.cards())
    mine = server.for_client(sealed, 0)

    assert server.send(0, stage=UPLOAD, packet=mine).shares

    for stage, packet in ((UPLOAD, mine), (SEAL_SHARES, mine), (OPEN_SUM, b"\1\1\1\1")):
        with pytest.raises(OrderRefused):
            server.send(0, stage=stage, packet=packet)
    assert server.fleet.steps() == [1, 0, 0, 0]


def test_a_sum_is_opened_once(server: Server) -> None:
    sealed = server.sealed(server.cards())
    server.send(0, stage=UPLOAD, packet=server.for_client(sealed, 0))

    assert server.send(0, stage=OPEN_SUM, packet=b"\1\1\1\0").packet

    with pytest.raises(OrderRefused, match="twice"):
        server.send(0, stage=OPEN_SUM, packet=b"\1\1\0\1")


def test_another_run_neither_opens_nor_ends_the_sum_of_the_first(server: Server) -> None:
    """A curious server starts a second run, and asks there for what the first one has agreed on."""
    sealed = server.sealed(server.cards())
    mine = server.for_client(sealed, 0)

    server.fleet.run = "two"
    with pytest.raises(OrderRefused, match="twice or in another order"):
        server.send(0, stage=UPLOAD, packet=mine)
    server.fleet.run = "one"
    assert server.send(0, stage=UPLOAD, packet=mine).shares
    server.fleet.run = "two"
    with pytest.raises(OrderRefused, match="twice or in another order"):
        server.send(0, stage=OPEN_SUM, packet=b"\1\1\1\1")
    server.fleet.run = "one"
    assert server.send(0, stage=OPEN_SUM, packet=b"\1\1\1\1").packet


def test_an_upload_that_asks_for_sizes_or_holds_two_orders_gets_nothing(server: Server) -> None:
    """The number of records is to be told by the sum alone, and an order is one record."""
    sealed = server.sealed(server.cards())

    with pytest.raises(OrderRefused, match="weighting"):
        server.send(0, stage=UPLOAD, packet=server.for_client(sealed, 0), weighting="size")
    config = replace(server.order, stage=UPLOAD, packet=server.for_client(sealed, 1)).to_config()
    arrays = {name: Array(array) for name, array in server.fleet.trainer.start.items()}
    content = RecordDict({"arrays": ArrayRecord(arrays), "config": ConfigRecord({**config})})
    content["again"] = ConfigRecord({**server.order.to_config()})
    with acting_for(1):
        message = Message(content, 2, MessageType.TRAIN)
    with pytest.raises(OrderRefused, match="2 ConfigRecords"):
        server.fleet.answer(1, message)
    assert server.fleet.steps() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cohort": 3}, "at most 0 where 3 clients"),
        ({"cohort": 40}, "terms of the sum"),
        ({"sum_noise": 21.0}, "terms of the sum"),
        ({"grid_norm": 2**17}, "terms of the sum"),
        ({"server_round": 2}, "terms of the sum"),
        ({"plan": "A"}, "terms of the sum"),
    ],
)
def test_a_server_cannot_change_the_terms_on_the_way(
    server: Server, changes: dict[str, Any], reason: str
) -> None:
    sealed = server.sealed(server.cards())

    with pytest.raises(OrderRefused, match=reason):
        server.send(0, stage=UPLOAD, packet=server.for_client(sealed, 0), **changes)
    assert server.fleet.steps() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"least_shares": 4}, "needs at least least-shares = 4"),
        ({"sum_records": 0}, "sum-records = 0"),
        ({"sum_records": 10_000}, "delta = 0.0005"),
        ({"trust_model": "local"}, "asks for a share of a secure sum"),
    ],
)
def test_a_client_shows_no_key_where_its_own_settings_forbid_it(
    server: Server, changes: dict[str, Any], reason: str
) -> None:
    if changes.get("trust_model"):
        changes = {**changes, "sample_rate": 0.0, "dropouts": 0, "sum_records": 0, "peers": ""}
    server.fleet.config = replace(server.fleet.config, **changes)

    with pytest.raises(OrderRefused, match=reason):
        server.send(0, stage=SHOW_KEYS)


@pytest.mark.parametrize("stage", [SHOW_KEYS, SEAL_SHARES])
@pytest.mark.parametrize(
    ("peers", "reason"),
    [
        ("", "a file with the identities of all clients, or 'any'"),
        ("missing.txt", "a text file that can be read"),
    ],
)
def test_a_client_without_a_list_of_peers_says_why_in_its_own_log_alone(
    server: Server, stage: str, peers: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.fleet.config = replace(server.fleet.config, peers=peers)

    with pytest.raises(ClientFailed, match=r"^The client could not do what was asked \(error"):
        server.send(0, stage=stage)
    assert reason in caplog.text


def test_a_list_of_peers_without_oneself_or_with_nonsense_is_refused(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for text, reason in (
        ("ab" * 32, "a list with this client's own identity"),
        ("# nobody\n", "at least one identity"),
        ("hospital-7\n", "line 1 of"),
        ("zz" * 32, "line 1 of"),
    ):
        file = tmp_path / "peers.txt"
        file.write_text(text)
        server.fleet.config = replace(server.fleet.config, peers=str(file))
        with pytest.raises(ClientFailed, match=r"^The client could not do what was asked \(error"):
            server.send(0, stage=SHOW_KEYS)
        assert reason in caplog.text


def test_secrets_that_are_damaged_are_named_in_the_clients_own_log_alone(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    cards = server.cards()
    (kept,) = server.fleet.stores[0]._folder.glob("*.json")
    kept.write_text("{")

    with pytest.raises(ClientFailed, match=r"^The client could not do what was asked \(error"):
        server.send(0, stage=SEAL_SHARES, packet=cards)
    assert "are damaged" in caplog.text


def test_a_damaged_identity_is_not_replaced(tmp_path: Path) -> None:
    store = SumStore(tmp_path)
    first = store.identity().public_key().public_bytes_raw()
    assert SumStore(tmp_path).identity().public_key().public_bytes_raw() == first
    key = tmp_path / "identity.key"
    assert key.stat().st_mode & 0o77 == 0
    key.write_text("nonsense")

    with pytest.raises(Exception, match="Restore the file from a backup"):
        store.identity()
    assert key.read_text() == "nonsense"
