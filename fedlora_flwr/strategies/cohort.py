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

from fedlora_flwr.errors import BudgetsSpent, FederationAborted, InvalidValue
from fedlora_flwr.randomness import stream_seed
from fedlora_flwr.strategies.identities import Identities
from fedlora_flwr.strategies.inbox import Inbox
from fedlora_flwr.strategies.replies import RoundReport
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

    def state_dict(self) -> dict[str, Any]:
        """Return what is counted, by client."""
        return {
            "taken": dict(self._taken), "places": dict(self._places), "spent": sorted(self._spent),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue counting from a state."""
        self._taken, self._places = Counter(state["taken"]), dict(state["places"])
        self._spent = set(state["spent"])

    def left(self, client: str) -> bool:
        """Tell whether a client may be asked again."""
        capped = self._most and self._taken[client] >= self._most
        return client not in self._spent and not capped

    def take(self, clients: Iterable[str]) -> None:
        """Count a round for each of the clients."""
        for client in clients:
            self._taken[client] += 1
            if client in self._places:
                self._places[client] += 1

    def rename(self, before: str, now: str) -> None:
        """Move a client's turns to the name that it gave after it was asked."""
        self._taken[now] += self._taken.pop(before, 0)
        if before in self._places:
            self._places[now] = max(self._places.get(now, 0), self._places.pop(before))

    def spend(self, client: str) -> None:
        """Never ask a client again: it has said that its budget is spent."""
        self._spent.add(client)

    def draw(self, clients: Sequence[str], size: int, generator: np.random.Generator) -> list[str]:
        """Draw a round's cohort.

        Without a cap every set of clients is equally likely. With a cap, those that had the
        fewest turns come first, and chance decides among equals. So every
        client has its turn before any client has its next one, and no client runs out of rounds
        before the others. A client that joins late starts where the others are. A client that was
        away catches up, since the run counts on its rounds.

        Parameters
        ----------
        clients : Sequence[str]
            Who may be asked, in an order that is the same in every run.
        size : int
            How many to draw; all if there are fewer.
        generator : numpy.random.Generator
            The round's own.

        Returns
        -------
        list[str]
            The cohort, in the order of ``clients``.
        """
        start = min((self._places[c] for c in clients if c in self._places), default=0)
        places = [self._places.setdefault(client, start) for client in clients]
        if size >= len(clients):
            return list(clients)
        if not self._most:
            drawn = generator.choice(len(clients), size, replace=False).tolist()
        else:
            shuffled = generator.permutation(len(clients)).tolist()
            drawn = sorted(shuffled, key=lambda i: places[i])[:size]
        return [clients[i] for i in sorted(drawn)]


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
        self._nodes: list[int] = []
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
        self.identities.look()
        size = cohort_size(len(nodes), fraction, least)
        # Turns are counted by client, so a resumed run has to know each node's client.
        if size < len(nodes) or self._restored:
            identify(grid, nodes, self.identities, self._timeout)
        able = self._able()
        if len(able) < least:
            raise BudgetsSpent(
                f"Round {server_round}: {len(able)} of {len(nodes)} connected clients have budget "
                f"left, but a round needs {least}. The others have joined as many rounds as "
                "max-rounds allows, or have said that their budget is spent."
            )
        return self._draw("cohort", server_round, able, size)

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
        order = sorted(nodes, key=self.identities.name)
        return [order[i] for i in sorted(drawn)]

    def took(self, nodes: Iterable[int]) -> None:
        """Count a round for nodes that were asked; their replies have told who they are."""
        named = {node: self.identities.name(node) for node in nodes}
        for node, now in named.items():
            if (before := self._drawn.get(node, now)) != now:
                self.turns.rename(before, now)
        self.turns.take(named.values())

    def left(self) -> int:
        """Return how many of the nodes that were connected last may be asked again."""
        name = self.identities.name
        return sum(self.turns.left(name(node)) for node in self._nodes)

    def _able(self) -> list[int]:
        name = self.identities.name
        return sorted((node for node in self._nodes if self.turns.left(name(node))), key=name)

    def _draw(self, purpose: str, server_round: int, nodes: list[int], size: int) -> list[int]:
        names = {self.identities.name(node): node for node in nodes}
        generator = self._generator(purpose, server_round)
        drawn = self.turns.draw(list(names), size, generator)
        self._drawn = {names[name]: name for name in drawn}
        return [names[name] for name in drawn]

    def _generator(self, purpose: str, server_round: int) -> np.random.Generator:
        return np.random.default_rng(stream_seed(self._seed, purpose, server_round))


def wait_for_nodes(
    grid: Grid,
    needed: int,
    timeout: float,
    name: Callable[[int], str] = str,
    known: Iterable[int] = (),
) -> list[int]:
    """Return the ids of all connected nodes, once there are enough; log once a minute meanwhile.

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
    while len(nodes := sorted(grid.get_node_ids())) < needed:
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
