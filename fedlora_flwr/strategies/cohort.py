"""Which nodes take part in a round."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import INFO, WARNING
from typing import Any

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedlora_flwr.errors import BudgetsSpent, FederationAborted, InvalidValue
from fedlora_flwr.randomness import stream_seed
from fedlora_flwr.strategies.identities import Identities
from fedlora_flwr.strategies.inbox import Inbox
from fedlora_flwr.strategies.replies import RoundReport
from fedlora_flwr.strategies.roster import Listed, Roster
from fedlora_flwr.wire import WEIGHTINGS

DECLINED = "its privacy budget is spent, or does not hold this run"
"""Why a client takes no part in a run any more."""
_TOLD_EVERY = 60.0  # seconds
_WHAT_TO_DO = "Start those that are missing: the run ends if they do not connect in time."


def cohort_size(clients: int, fraction: float, least: int = 1) -> int:
    """Return how many clients a round has: the share, rounded down, from ``least`` to all."""
    # 0.29 of 100 is 28.999999999999996 in floating point.
    return min(max(math.floor(clients * fraction + 1e-9), least), clients)


def check_rules(min_completion: float, max_rounds: int, weighting: str) -> None:
    """Refuse arguments of a strategy that are out of range.

    Raises
    ------
    InvalidValue
        An argument is out of range.
    """
    if not 0 <= min_completion <= 1:
        raise InvalidValue("min_completion", min_completion, "a number from 0 to 1")
    if max_rounds < 0:
        raise InvalidValue("max_rounds", max_rounds, "a whole number of at least 0")
    if weighting not in WEIGHTINGS:
        raise InvalidValue("weighting", weighting, f"one of {WEIGHTINGS}")


class Turns:
    """How many rounds each client of a run was asked for, and who is next.

    A client that was asked has had its turn, whether or not it answered: its ledger may hold the
    round. This count only says whom to ask. The budget is the client's own, in its own ledger.

    Parameters
    ----------
    most : int (default: 0)
        Rounds that one client may be asked for; 0 where nothing caps them.
    """

    def __init__(self, most: int = 0) -> None:
        self._most = most
        self._taken: Counter[str] = Counter()
        self._places: dict[str, int] = {}
        self._spent: set[str] = set()
        self._done: set[str] = set()  # Those that may not be asked again.

    def state_dict(self) -> dict[str, Any]:
        """Return what is counted, by client."""
        return {
            "taken": dict(self._taken), "places": dict(self._places), "spent": sorted(self._spent),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue counting from a state."""
        self._taken, self._places = Counter(state["taken"]), dict(state["places"])
        self._spent = set(state["spent"])
        self._done = self._spent.union(filter(self._has_had_all, self._taken))

    def left(self, there: Roster) -> int:
        """Return how many of the clients that are there may be asked again."""
        return len(there) - len(self._out(there))

    def take(self, clients: Iterable[str]) -> None:
        """Count a round for each of the clients."""
        for client in clients:
            self._taken[client] += 1
            if client in self._places:
                self._places[client] += 1
            if self._has_had_all(client):
                self._done.add(client)

    def rename(self, before: str, now: str) -> None:
        """Move a client's turns to the name that it gave after it was asked."""
        self._taken[now] += self._taken.pop(before, 0)
        if before in self._places:
            self._places[now] = max(self._places.get(now, 0), self._places.pop(before))

    def spend(self, client: str) -> None:
        """Never ask a client again: it has said that its budget is spent."""
        self._spent.add(client)
        self._done.add(client)

    def draw(self, there: Roster, size: int, generator: np.random.Generator) -> list[int]:
        """Draw a round's cohort among those that may be asked again.

        Without a cap every set of clients is equally likely, and a draw costs no more with more
        clients. With a cap, those that had the fewest turns come first, and chance decides among
        equals. So every client has its turn before any client has its next one, and no client
        runs out of rounds before the others. A client that joins late starts where the others are.
        A client that was away catches up, since the run counts on its rounds.

        Parameters
        ----------
        there : Roster
            Who is there.
        size : int
            How many to draw; all if there are fewer.
        generator : numpy.random.Generator
            The round's own.

        Returns
        -------
        list[int]
            The positions of the cohort, ascending.
        """
        out = self._out(there)
        able = len(there) - len(out)
        if size >= able:
            ranks = np.arange(able)
        elif not self._most:
            ranks = np.sort(generator.choice(able, size, replace=False))
        else:
            shuffled = generator.permutation(able)
            places = np.delete(self._places_of(there, out), out)
            ranks = np.sort(shuffled[np.argsort(places[shuffled], kind="stable")[:size]])
        # Ranks count those that may be asked, and positions count everybody.
        before = np.searchsorted(out - np.arange(len(out)), ranks, side="right")
        found: list[int] = (ranks + before).tolist()
        return found

    def _has_had_all(self, client: str) -> bool:
        return bool(self._most) and self._taken[client] >= self._most

    def _out(self, there: Roster) -> NDArray[np.int64]:
        """Return the positions of those that may not be asked again, ascending."""
        found = (there.find(client) for client in self._done)
        return np.array(sorted(p for p in found if p is not None), np.int64)

    def _places_of(self, there: Roster, out: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the place of each client that is there, by position, and let new ones join."""
        if not there.lasting:
            able = np.delete(np.arange(len(there)), out).tolist()
            names = [there.name(position) for position in able]
            start = min((self._places[name] for name in names if name in self._places), default=0)
            for name in names:
                self._places.setdefault(name, start)
        places = np.zeros(len(there), np.int64)
        # Everybody on a lasting roster has been there from the beginning.
        for name, place in (*self._taken.items(), *self._places.items()):
            if (position := there.find(name)) is not None:
                places[position] = place
        return places


class Cohorts:
    """Draws the cohorts of one run.

    Parameters
    ----------
    grid : Grid
        The run's grid. Its node ids belong to this run.
    seed : int
        Node ids change between runs and identities do not, so one seed draws the same clients.
    max_rounds : int
        Rounds that one client may be asked for; 0 for all.
    timeout : float
        Seconds to wait for nodes.
    """

    def __init__(self, grid: Grid, seed: int, max_rounds: int, timeout: float) -> None:
        self.identities = Identities(grid)
        self.turns = Turns(max_rounds)
        self._seed = seed
        self._timeout = timeout
        self._nodes: Sequence[int] = ()
        self._drawn: dict[int, str] = {}
        self._restored = False

    def load_state_dict(self, turns: Mapping[str, Any]) -> None:
        """Take over the turns of a run that was interrupted; its node ids mean nothing here."""
        self.turns.load_state_dict(turns)
        self._restored = True

    def train(
        self, grid: Grid, server_round: int, fraction: float, needed: int, least: int
    ) -> list[int]:
        """Draw the nodes that train in a round.

        Parameters
        ----------
        grid : Grid
            Where to look for nodes.
        server_round : int
            Round, from 1.
        fraction : float
            Share of the connected nodes.
        needed, least : int
            Nodes that must be connected, and that a cohort must have.

        Raises
        ------
        FederationAborted
            Too few nodes connected in time.
        BudgetsSpent
            Fewer than ``least`` of the connected nodes may be asked again.
        """
        names = self.identities.shown
        nodes = wait_for_nodes(grid, max(needed, least), self._timeout, names, self._nodes)
        self._nodes = nodes
        self.identities.look(nodes)
        size = cohort_size(len(nodes), fraction, least)
        # Turns are counted by client, so a resumed run has to know each node's client.
        if size < len(nodes) or self._restored:
            identify(grid, nodes, self.identities, self._timeout)
        there = self._in_order(nodes)
        if (able := self.turns.left(there)) < least:
            raise BudgetsSpent(
                f"Round {server_round}: {able} of {len(nodes)} connected clients have budget "
                f"left, but a round needs {least}. The others have joined as many rounds as "
                "max-rounds allows, or have said that their budget is spent."
            )
        positions = self.turns.draw(there, size, self._generator("cohort", server_round))
        self._drawn = {there[position]: there.name(position) for position in positions}
        return list(self._drawn)

    def evaluate(self, grid: Grid, server_round: int, fraction: float, least: int) -> list[int]:
        """Draw the nodes that measure after a round, which costs no budget.

        Raises
        ------
        FederationAborted
            Fewer than ``least`` nodes connected in time.
        """
        nodes = wait_for_nodes(grid, least, self._timeout)
        size = cohort_size(len(nodes), fraction, least)
        generator = self._generator("evaluation", server_round)
        drawn = generator.choice(len(nodes), size, replace=False).tolist()
        there = self._in_order(nodes)
        return [there[position] for position in sorted(drawn)]

    def took(self, nodes: Iterable[int]) -> None:
        """Count a round for nodes that were asked; their replies have told who they are."""
        named = {node: self._counted_as(node) for node in nodes}
        for node, now in named.items():
            if (before := self._drawn.get(node, now)) != now:
                self.turns.rename(before, now)
        self.turns.take(named.values())

    def spend(self, client: str) -> None:
        """Never ask a client of the round again: it has said that its budget is spent."""
        name = self.identities.name
        node = next((node for node in self._drawn if name(node) == client), None)
        self.turns.spend(client if node is None else self._counted_as(node))

    def left(self) -> int:
        """Return how many of the nodes that were connected last may be asked again."""
        return self.turns.left(self._in_order(self._nodes))

    def _counted_as(self, node: int) -> str:
        """Return the name under which a node's turns are counted, the same in a resumed run."""
        return self.identities.vouched(node) or self.identities.name(node)

    def _in_order(self, nodes: Sequence[int]) -> Roster:
        return nodes if isinstance(nodes, Roster) else Listed(nodes, self.identities.name)

    def _generator(self, purpose: str, server_round: int) -> np.random.Generator:
        return np.random.default_rng(stream_seed(self._seed, purpose, server_round))


def wait_for_nodes(
    grid: Grid,
    needed: int,
    timeout: float,
    name: Callable[[int], str] = str,
    known: Iterable[int] = (),
) -> Sequence[int]:
    """Return the ids of all connected nodes, once there are enough; log once a minute meanwhile.

    A grid's roster is returned as it is, and a list of other nodes is sorted.

    Parameters
    ----------
    grid : Grid
        Where to look for nodes.
    needed : int
        How many are enough.
    timeout : float
        Seconds to wait.
    name : callable, optional
        Names a node.
    known : Iterable[int], optional
        Nodes that were connected before; those that are gone are named.

    Raises
    ------
    FederationAborted
        Too few nodes connected in time.
    """
    begun, told = time.monotonic(), -math.inf
    while len(nodes := _connected(grid)) < needed:
        lost = sorted(name(node) for node in set(known) - set(nodes))
        gone = f" Gone: {', '.join(lost[:10])}." if lost else ""
        waited = time.monotonic() - begun
        if waited > timeout:
            raise FederationAborted(
                f"{len(nodes)} of at least {needed} nodes connected in {timeout:g} s.{gone} Start "
                "them, or set a smaller min-clients."
            )
        if waited >= told + _TOLD_EVERY:
            told = waited
            have = f"{len(nodes)} of {needed} connected, {waited:.0f} of {timeout:g} s waited"
            log(INFO, "Waiting for nodes: %s.%s %s", have, gone, _WHAT_TO_DO)
        time.sleep(1)
    return nodes


def _connected(grid: Grid) -> Sequence[int]:
    nodes = grid.get_node_ids()
    return nodes if isinstance(nodes, Roster) else sorted(nodes)


def identify(grid: Grid, nodes: Sequence[int], identities: Identities, timeout: float) -> None:
    """Ask nodes once who they are; a client without our bridge does not answer."""
    unknown = identities.unasked(nodes)
    if not unknown:
        return
    queries = [Message(RecordDict(), node, MessageType.QUERY) for node in unknown]
    replies = grid.send_and_receive(queries, timeout=timeout)
    report = RoundReport(0, "", sent=len(unknown))
    answers = list(Inbox(identities, unknown, MessageType.QUERY, report).read(replies))
    named = sum(identities.of(node) != "" for node in unknown)
    if named < len(unknown):
        log(WARNING, "Some clients do not tell their identity, so random node ids stand for them.")
        for line in sorted(report.failures) if answers else ():
            log(WARNING, "\t> %s", line)
