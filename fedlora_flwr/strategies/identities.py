"""Identities of nodes: a reply counts for the node that sent it, under that node's identity."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from filelock import FileLock

from fedlora_flwr.errors import FedLoRAError, InvalidValue
from fedlora_flwr.files import replacing
from fedlora_flwr.strategies.roster import Roster

_NODE = re.compile(r"node \d+")
_LAST_COMMA = re.compile(r",\s*}\s*$")


@dataclass(frozen=True)
class KnownNode:
    """What a grid knows of a node, apart from what the node says.

    Parameters
    ----------
    key : str
        What an identity is bound to: the fingerprint of a SuperNode's key, or a partition.
    name : str
        The identity that nobody else may have: the name under which an operator registered the
        node's key, or its partition's. Empty where there is none.
    lasting : bool
        Whether the key is the same in the next run.
    """

    key: str
    name: str = ""
    lasting: bool = False


@runtime_checkable
class KnowsNodes(Protocol):
    """A grid that can tell nodes apart by more than their ids, which change between runs."""

    bindings: Path | None
    """File that keeps which key each identity is bound to; None keeps nothing."""

    def known_nodes(self) -> Mapping[int, KnownNode]:
        """Return what is known of each connected node."""
        ...


class Identities:
    """The identities of one run's nodes.

    A node gets its identity on first contact: from then on no other node may answer under it, and
    the node may answer under no other. Where keys outlive a run, the file keeps the binding.

    Parameters
    ----------
    grid : object
        The run's grid. One that does not know its nodes binds identities to node ids.
    """

    def __init__(self, grid: object) -> None:
        self._asked: set[int] = set()
        self._grid = grid if isinstance(grid, KnowsNodes) else None
        self._roster: Roster | None = None
        self._nodes: dict[int, KnownNode] = {}
        self._owners: dict[str, Counter[str]] = {}
        self._of_node: dict[int, str] = {}
        self._bound = _Bindings()
        self._file = None if self._grid is None else self._grid.bindings
        if self._file is not None:
            self._bound.update(read_bindings(self._file))

    def unasked(self, nodes: Sequence[int]) -> list[int]:
        """Return the nodes that were not asked who they are yet, and note that they are now.

        Nodes whose names the grid vouches for are not asked.
        """
        if nodes is self._roster:
            return []
        found = [node for node in nodes if node not in self._asked]
        self._asked.update(found)
        return found

    def look(self, connected: Iterable[int] = ()) -> None:
        """Learn about nodes that have connected since.

        Parameters
        ----------
        connected : Iterable[int]
            What the grid has told of its nodes. A lasting roster tells everything.
        """
        if isinstance(connected, Roster) and connected.lasting:
            self._roster = connected
            return
        for node, known in self._grid.known_nodes().items() if self._grid else ():
            before = self._nodes.get(node)
            if before is not known and before != known:
                self._nodes[node] = known
                self._owners.setdefault(known.name, Counter())[known.key] += 1
                if before is not None:
                    self._owners[before.name] -= Counter([before.key])

    def of(self, node: int) -> str:
        """Return a node's identity, or an empty text as long as it has none."""
        return self._of_node.get(node) or self.vouched(node)

    def vouched(self, node: int) -> str:
        """Return the name of a node that its grid vouches for, or an empty text."""
        there = self._roster
        return there.name(there.index(node)) if there is not None and node in there else ""

    def name(self, node: int) -> str:
        """Return what to call a node: its identity, or its id as long as it has none."""
        return self.of(node) or f"node {node:020d}"

    def shown(self, node: int) -> str:
        """Return what to call a node in a message: also the name of a node that has not spoken."""
        return self.of(node) or getattr(self._nodes.get(node), "name", "") or self.name(node)

    def claim(self, node: int, client: str) -> str:
        """Give a node the identity that it says it has.

        Parameters
        ----------
        node : int
            Flower's node id.
        client : str
            Who it says it is; empty if it does not say.

        Returns
        -------
        str
            Its identity, or `name` where it says nothing.

        Raises
        ------
        FedLoRAError
            The identity is another node's, or the node has another one.
        """
        own = self._of_node.get(node)
        if not client or client == own:
            return self.name(node)
        known = self._nodes.get(node, KnownNode(self.name(node)))
        if own:
            raise FedLoRAError(f"it answers in the name of {client!r}, but was {own!r} before")
        if _NODE.fullmatch(client) or self._is_anothers(client, known):
            raise FedLoRAError(f"it answers in the name of {client!r}, which is another node's")
        self._bind(client, known)
        self._of_node[node] = client
        return client

    def _is_anothers(self, client: str, known: KnownNode) -> bool:
        """Tell whether a name is registered, and for other keys alone."""
        if self._roster is not None:
            return client != known.key and self._roster.find(client) is not None
        owners = self._owners.get(client, Counter())
        return bool(owners) and known.key not in owners

    def _bind(self, client: str, known: KnownNode) -> None:
        if known.lasting and self._file is not None:
            with _locked(self._file):  # Another run's server may write, too.
                kept = read_bindings(self._file)
                self._bound.update(kept)
                if not self._check_free(client, known):
                    self._bound.update({client: known.key})
                    _write(self._file, {**kept, client: known.key})
        elif not self._check_free(client, known):
            self._bound.update({client: known.key})

    def _check_free(self, client: str, known: KnownNode) -> bool:
        """Tell whether an identity is bound to this very key; refuse one that is another's."""
        hint = f". If its key is new, remove its line from {self._file}" if known.lasting else ""
        bound = self._bound.keys.get(client)
        if bound is not None and bound != known.key:
            text = f"it answers in the name of {client!r}, which is bound to another node"
            raise FedLoRAError(text + hint)
        others = self._bound.clients.get(known.key)
        if others and client not in others:
            other = next(iter(others))
            raise FedLoRAError(
                f"it answers in the name of {client!r}, and its key is bound to {other!r}{hint}"
            )
        return bound is not None


class _Bindings:
    """Which key each identity is bound to, and which identities each key has."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        self.clients: dict[str, dict[str, None]] = {}  # In the order in which they were bound.

    def update(self, keys: Mapping[str, str]) -> None:
        for client, key in keys.items():
            before = self.keys.get(client, key)
            if before != key:
                del self.clients[before][client]
            self.keys[client] = key
            self.clients.setdefault(key, {})[client] = None


def _locked(file: Path) -> FileLock:
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return FileLock(f"{file}.lock", mode=0o600)


def read_bindings(file: Path) -> dict[str, str]:
    """Read which key each identity is bound to."""
    if not file.exists():
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        # Whoever removes the last line by hand leaves the comma of the line before it.
        content = json.loads(_LAST_COMMA.sub("}", text))
        if not all(isinstance(key, str) for key in content.values()):
            raise ValueError("a key is not text")
        return dict(content)
    except (OSError, ValueError, AttributeError) as error:
        allowed = f"a JSON object of identities and keys ({error}). Restore it from a backup, or "
        allowed += "remove it. Each identity is then bound again on first contact"
        raise InvalidValue("file of identities", str(file), allowed) from error


def _write(file: Path, content: Mapping[str, str]) -> None:
    text = json.dumps(dict(sorted(content.items())), indent=1) + "\n"
    with replacing(file) as draft:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
