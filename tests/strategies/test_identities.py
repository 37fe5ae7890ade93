"""A reply belongs to the node that sent it, and an identity to one node."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedlora_flwr.errors import FedLoRAError, InvalidValue
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies import FedLoRA
from fedlora_flwr.strategies.identities import Identities, KnownNode
from tests.strategies.crafting import Case
from tests.strategies.tiny import Fleet as AskedFleet
from tests.strategies.tiny import Tiny, arrays_of, record_of, start_arrays


@dataclass
class Fleet:
    """A grid that knows the keys of its nodes; ids are new in each run, as Flower's may be."""

    bindings: Path | None
    keys: Mapping[int, str]
    names: Mapping[int, str] = field(default_factory=dict)
    lasting: bool = True

    def known_nodes(self) -> Mapping[int, KnownNode]:
        return {n: KnownNode(k, self.names.get(n, ""), self.lasting) for n, k in self.keys.items()}


def identities(fleet: object) -> Identities:
    found = Identities(fleet)
    found.look()
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "server" / "identities.json"


def test_the_first_node_to_have_an_identity_keeps_it() -> None:
    found = identities(Fleet(None, {1: "k1", 2: "k2"}))
    assert found.claim(1, "ward-3") == "ward-3"
    with pytest.raises(FedLoRAError, match="in the name of 'ward-3', which is bound to another"):
        found.claim(2, "ward-3")
    assert found.claim(1, "ward-3") == "ward-3"
    assert (found.of(1), found.of(2)) == ("ward-3", "")


def test_a_node_has_one_identity() -> None:
    found = identities(Fleet(None, {1: "k1"}))
    found.claim(1, "ward-3")
    with pytest.raises(FedLoRAError, match="in the name of 'ward-4', but was 'ward-3' before"):
        found.claim(1, "ward-4")
    # A node that says nothing is still who it was.
    assert found.claim(1, "") == "ward-3"


def test_a_grid_without_keys_binds_to_node_ids() -> None:
    found = identities(object())
    found.claim(1, "ward-3")
    with pytest.raises(FedLoRAError, match="another node"):
        found.claim(2, "ward-3")
    assert found.claim(2, "") == f"node {2:020d}"


@pytest.mark.parametrize("name", ["node 00000000000000000002", "node 7"])
def test_nobody_is_called_as_the_server_calls_nodes_without_a_name(name: str) -> None:
    with pytest.raises(FedLoRAError, match="another node's"):
        identities(object()).claim(1, name)


def test_a_name_that_is_registered_for_another_key_is_no_longer_the_first_ones() -> None:
    fleet = Fleet(None, {1: "k1"}, {1: "device-01"})
    found = identities(fleet)
    fleet.keys, fleet.names = {1: "k1", 2: "k2"}, {1: "device-02", 2: "device-01"}
    found.look()
    with pytest.raises(FedLoRAError, match="which is another node's"):
        found.claim(1, "device-01")
    assert [found.claim(2, "device-01"), found.claim(1, "device-02")] == ["device-01", "device-02"]


def test_a_registered_name_is_its_nodes_alone_before_it_has_answered() -> None:
    fleet = Fleet(None, {1: "k1", 2: "k2"}, {1: "device-01", 2: "device-02"})
    found = identities(fleet)
    with pytest.raises(FedLoRAError, match="'device-01', which is another node's"):
        found.claim(2, "device-01")
    assert found.claim(1, "device-01") == "device-01"
    assert found.claim(2, "some other name") == "some other name"


def test_a_binding_holds_in_the_next_run_whatever_the_nodes_ids_are(file: Path) -> None:
    identities(Fleet(file, {1: "k1", 2: "k2"})).claim(1, "ward-3")
    later = identities(Fleet(file, {7: "k1", 8: "k2"}))
    with pytest.raises(FedLoRAError, match=r"bound to another node.*remove its line from .*json"):
        later.claim(8, "ward-3")
    with pytest.raises(FedLoRAError, match="its key is bound to 'ward-3'"):
        later.claim(7, "ward-4")
    assert later.claim(7, "ward-3") == "ward-3"
    assert json.loads(file.read_text()) == {"ward-3": "k1"}


def test_two_servers_at_once_do_not_overwrite_each_others_bindings(file: Path) -> None:
    one, other = (identities(Fleet(file, {1: "k1", 2: "k2"})) for _ in range(2))
    one.claim(1, "ward-3")
    with pytest.raises(FedLoRAError, match="another node"):
        other.claim(2, "ward-3")
    other.claim(2, "ward-4")
    assert json.loads(file.read_text()) == {"ward-3": "k1", "ward-4": "k2"}


def test_only_the_servers_user_reads_the_file(file: Path) -> None:
    identities(Fleet(file, {1: "k1"})).claim(1, "ward-3")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert {entry.name for entry in file.parent.iterdir()} <= {file.name, f"{file.name}.lock"}


def test_keys_for_one_start_are_not_kept(file: Path) -> None:
    identities(Fleet(file, {1: "k1"}, lasting=False)).claim(1, "ward-3")
    assert not file.exists()


@pytest.mark.parametrize("gone", ["ward-3", "ward-4"])
def test_a_line_that_was_removed_by_hand_frees_that_name_alone(file: Path, gone: str) -> None:
    identities(Fleet(file, {1: "k1"})).claim(1, "ward-3")
    identities(Fleet(file, {2: "k2"})).claim(2, "ward-4")
    lines = file.read_text().splitlines(keepends=True)
    # The comma of the line before the last one stays behind.
    file.write_text("".join(line for line in lines if gone not in line))
    assert identities(Fleet(file, {3: "k3"})).claim(3, gone) == gone
    kept = json.loads(file.read_text())
    assert sorted(kept) == ["ward-3", "ward-4"]
    assert kept[gone] == "k3"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"ward-3": 7}', "\xff"])
def test_a_damaged_file_is_refused_and_never_taken_for_an_empty_one(
    file: Path, content: str
) -> None:
    file.parent.mkdir()
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(InvalidValue, match="Restore it from a backup"):
        identities(Fleet(file, {1: "k1"}))
    assert file.read_bytes() == content.encode("latin-1")


def play(strategy: FedLoRA, grid: LocalGrid, server_round: int, thief: int, name: str) -> list[str]:
    """Play a round in which one client answers first, under a name; return who was used."""
    config = ConfigRecord()
    sent = list(strategy.configure_train(server_round, record_of(start_arrays()), config, grid))
    names = {node: known.name for node, known in grid.known_nodes().items()}
    sent.sort(key=lambda message: names[message.metadata.dst_node_id])
    cases = [Case(message, i, sent) for i, message in enumerate(sent)]
    stolen = cases[thief].content()
    stolen.config_records["config"]["client"] = name
    replies = [Message(stolen, reply_to=sent[thief])]
    replies += [case.honest() for case in cases if case.number != thief]
    strategy.aggregate_train(server_round, replies)
    assert strategy.last_round is not None
    return [upload.client for upload in strategy.last_round.uploads]


def test_who_answers_in_anothers_name_fails_and_the_other_does_not() -> None:
    strategy = FedLoRA()
    with LocalGrid(Tiny(3).app(), 3, {}).running() as grid:
        for server_round in (1, 2):
            used = play(strategy, grid, server_round, thief=2, name="partition-000000")
            assert used == ["partition-000000", "partition-000001"]
            assert strategy.last_round is not None
            (line,) = strategy.last_round.failures
            assert line.startswith("partition-000002: ")
            assert "in the name of 'partition-000000', which is another node's" in line


def test_a_thief_does_not_spoil_what_the_server_remembers_of_the_other() -> None:
    strategy = FedLoRA()
    with LocalGrid(Tiny(3).app(), 3, {}).running() as grid:
        # Steps of a stolen reply would make the real client's ledger look as if it had lost rows.
        play(strategy, grid, 2, thief=2, name="partition-000000")
        used = play(strategy, grid, 3, thief=2, name="partition-000002")
    assert used == [f"partition-{i:06d}" for i in range(3)]


def asked(answer: RecordDict | None, bad: int = 1) -> list[int]:
    """Run with cohorts, while one client answers badly who it is; return the first cohort."""
    tiny = Tiny(4)

    class Strange(AskedFleet):
        def pull_messages(self, message_ids: object) -> list[Message]:
            found = []
            for reply in super().pull_messages(message_ids):  # type: ignore[arg-type]
                node = self._nodes.index(reply.metadata.src_node_id)
                if reply.metadata.message_type == "query" and node == bad:
                    if answer is None:
                        continue
                    reply.content = answer
                found.append(reply)
            return found

    strategy = FedLoRA(fraction_train=0.5, seed=3)
    with Strange(tiny.app(), 4, {}).running() as grid:
        result = strategy.start(grid, record_of(start_arrays()), num_rounds=2)
    assert arrays_of(result.arrays)
    return tiny.cohort(1)


@pytest.mark.parametrize(
    "answer",
    [
        None,
        RecordDict(),
        RecordDict({"config": ConfigRecord()}),
        RecordDict({"config": ConfigRecord({"client": ""})}),
        RecordDict({"config": ConfigRecord({"client": "partition-000000"})}),
        RecordDict({"config": ConfigRecord({"client": "a\nb"})}),
        RecordDict({"config": ConfigRecord({"client": [1, 2]})}),
        RecordDict({"other": ConfigRecord({"client": 7})}),
    ],
)
def test_a_bad_answer_to_who_it_is_does_not_end_the_run(answer: RecordDict | None) -> None:
    assert len(asked(answer)) == 2
