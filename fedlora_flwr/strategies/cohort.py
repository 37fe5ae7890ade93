"""Which nodes take part in a round."""

from __future__ import annotations

import time
from collections.abc import Sequence
from logging import INFO, WARNING

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedlora_flwr.errors import FederationAborted
from fedlora_flwr.randomness import stream_seed
from fedlora_flwr.strategies.identities import Identities
from fedlora_flwr.strategies.inbox import Inbox
from fedlora_flwr.strategies.replies import RoundReport


def wait_for_nodes(grid: Grid, needed: int, timeout: float) -> list[int]:
    """Return the ids of all connected nodes, once there are enough.

    Raises
    ------
    FederationAborted
        Too few nodes connected in time.
    """
    deadline = time.monotonic() + timeout
    while len(nodes := sorted(grid.get_node_ids())) < needed:
        if time.monotonic() > deadline:
            raise FederationAborted(
                f"{len(nodes)} of at least {needed} nodes connected in {timeout:g} s."
            )
        log(INFO, "Waiting for nodes: %d of %d connected.", len(nodes), needed)
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
        log(WARNING, "Some clients do not say who they are: cohorts follow random node ids.")
        for line in sorted(report.failures) if answers else ():
            log(WARNING, "\t> %s", line)


def draw(
    nodes: Sequence[int], identities: Identities, size: int, seed: int, server_round: int
) -> list[int]:
    """Draw a round's cohort.

    Node ids change between runs; identities do not, so the same seed draws the same clients.
    """
    order = sorted(nodes, key=identities.of)
    generator = np.random.default_rng(stream_seed(seed, "cohort", server_round))
    return [order[i] for i in sorted(generator.choice(len(order), size, replace=False))]
