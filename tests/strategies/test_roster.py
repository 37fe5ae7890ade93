"""Who is there, by position and by name."""

from __future__ import annotations

import pytest

from fedlora_flwr.simulations.partitions import Partitions
from fedlora_flwr.strategies.roster import Attendance, Listed, Roster

NAMES = {30: "ward-3", 10: "ward-2", 20: "ward-1"}


@pytest.mark.parametrize("roster", [Listed(NAMES, NAMES.__getitem__), Partitions(3)])
def test_nodes_names_and_positions_belong_together(roster: Roster) -> None:
    names = [roster.name(position) for position in range(3)]
    assert names == sorted(names)
    assert [roster.find(name) for name in names] == [0, 1, 2]
    assert [roster.index(node) for node in roster] == [0, 1, 2]
    assert roster[-1] == roster[2] == list(roster)[2]
    assert roster[1:] == list(roster)[1:]
    assert len(set(roster)) == len(roster) == 3
    with pytest.raises(IndexError):
        _ = roster[3]


@pytest.mark.parametrize(
    "name",
    ["", "partition-", "partition-3", "partition-000003", "partition--00001", "partition-0000001",
     "node 1", "x-partition-000001", "partition-00000²"],
)  # fmt: skip
def test_only_its_own_names_are_found(name: str) -> None:
    assert Partitions(3).find(name) is None


def test_a_number_is_no_node_unless_a_partition_has_it() -> None:
    nodes = Partitions(1000)
    strangers = {node + 1 for node in nodes} - {*nodes}
    assert strangers
    for stranger in (0, 1, -1, 2**62 + 2, nodes[5] + 2**62, *strangers):
        assert stranger not in nodes
        with pytest.raises(ValueError, match="not a node of this simulation"):
            nodes.index(stranger)
    assert nodes[999] in nodes
    with pytest.raises(ValueError, match="not a node"):
        nodes.index(nodes[999], 0, 999)


def test_names_continue_after_the_first_million() -> None:
    nodes = Partitions(1_000_002)
    assert [nodes.find(nodes.name(i)) for i in (999_999, 1_000_001)] == [999_999, 1_000_001]


def test_who_has_been_there_is_remembered() -> None:
    seen = Attendance()
    assert (seen.gone([1, 2]), len(seen)) == ([], 2)
    assert (sorted(seen.gone([2, 3])), len(seen)) == ([1], 3)
    assert (sorted(seen.gone([])), len(seen)) == ([1, 2, 3], 3)
    assert seen.gone([1, 2, 3]) == []


def test_nobody_leaves_a_lasting_roster() -> None:
    seen, nodes = Attendance(), Partitions(1_000_000)
    assert (seen.gone(nodes), seen.gone(nodes), len(seen)) == ([], [], 1_000_000)
