"""Find the sender of each reply, and pass on the replies that a strategy can read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from logging import WARNING
from typing import overload

from flwr.app import Message, RecordDict
from flwr.common.logger import log

from fedlora_flwr.strategies.identities import Identities
from fedlora_flwr.strategies.reasons import reason_of
from fedlora_flwr.strategies.replies import RoundReport, most_common
from fedlora_flwr.wire.records import client_of, read_figures
from fedlora_flwr.wire.report import Report


class Replies(Sequence[Message]):
    """The replies to some messages, read as they come.

    It is a sequence, as Flower's strategies expect it, for which all replies are kept. `once` keeps
    none. Nothing is read before either is asked for.

    Parameters
    ----------
    source : Iterable[tuple[int, Message]]
        Each reply, and its place in the sequence.
    """

    def __init__(self, source: Iterable[tuple[int, Message]]) -> None:
        self._source = iter(source)
        self._kept: list[Message] | None = None

    def once(self) -> Iterator[Message]:
        """Yield each reply when it is there; it is not there a second time."""
        if self._kept is not None:
            yield from self._kept
            return
        for _, reply in self._source:
            yield reply

    def _all(self) -> list[Message]:
        if self._kept is None:
            self._kept = [reply for _, reply in sorted(self._source, key=lambda pair: pair[0])]
        return self._kept

    def __len__(self) -> int:
        return len(self._all())

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> list[Message]: ...
    def __getitem__(self, index: int | slice) -> Message | list[Message]:
        return self._all()[index]


class Inbox:
    """The replies to one batch of messages.

    Parameters
    ----------
    identities : Identities
        Who is who in this run.
    asked : Sequence[int]
        The nodes that got a message, one message each.
    kind : str
        The type of the messages.
    report : RoundReport
        Where failures are counted.
    silent : str
        What to say of a node that did not answer.
    """

    def __init__(
        self,
        identities: Identities,
        asked: Sequence[int],
        kind: str,
        report: RoundReport,
        silent: str = "no reply in time",
    ) -> None:
        self._identities = identities
        self._waiting = dict.fromkeys(asked)
        self._asked = frozenset(asked)
        self._kind = kind
        self._report = report
        self._silent = silent

    def read(self, replies: Iterable[Message]) -> Iterator[tuple[str, RecordDict]]:
        """Yield sender and content of each reply that has both.

        Every other reply is a failure of the node that sent it, and so is a node's silence.
        """
        for reply in replies.once() if isinstance(replies, Replies) else replies:
            node = reply.metadata.src_node_id
            try:
                found = self._open(node, reply)
            except Exception as error:  # One client's reply must not end the others' round.
                self._report.fail(self._identities.name(node), error)
                continue
            if found is not None:
                yield found
        for node in self._waiting:
            self._report.fail(self._identities.name(node), self._silent)

    def _open(self, node: int, reply: Message) -> tuple[str, RecordDict] | None:
        name = self._identities.name(node)
        if reply.has_error() and node not in self._asked:
            # If a node is gone, Flower sends an error under its own name, not the node's.
            self._report.fail(name, reason_of(reply.error.reason))
            return None
        if node not in self._waiting:
            again = (
                "it answered twice" if node in self._asked else "it answered without being asked"
            )
            self._report.fail(name, again)
            return None
        del self._waiting[node]
        if reply.has_error():
            self._report.fail(name, reason_of(reply.error.reason))
            return None
        if reply.metadata.message_type != self._kind:
            reason = f"it answered a message of type {reply.metadata.message_type[:40]!r}"
            self._report.fail(name, f"{reason}, but was sent one of type {self._kind!r}")
            return None
        return self._identities.claim(node, client_of(reply.content)), reply.content


def read_measurements(
    inbox: Inbox, replies: Iterable[Message], report: RoundReport
) -> list[tuple[str, Report]]:
    """Read what clients measured, ordered by client; all numbers have the same names."""
    before = len(report.failures)
    found: dict[str, Report] = {}
    for client, content in inbox.read(replies):
        try:
            found[client] = read_figures(content)
        except Exception as error:  # One client's reply must not end the others' round.
            report.fail(client, error)
    names = {client: frozenset(own.numbers()) for client, own in found.items()}
    common = most_common(list(names.values())) if names else frozenset()
    for client, own in names.items():
        if own != common:
            del found[client]
            text = f"its figures are {sorted(own)}, but those of the others are {sorted(common)}"
            report.fail(client, text)
    report.failures[before:] = sorted(report.failures[before:])
    for line in report.failures[before:]:
        log(WARNING, "\t> round %d: %s", report.server_round, line)
    return sorted(found.items(), key=lambda entry: entry[0])
