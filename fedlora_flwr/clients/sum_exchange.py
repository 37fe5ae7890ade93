"""A client's part in the messages of a masked sum. It needs neither model nor records.

The attackers are the server and clients that collude with it. They may send any message at any
time, any number of times, and different messages to different clients. The rules against that are
those of `fedlora_flwr.secure_sum.party`. This module applies them to orders, files and the
client's own settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedlora_flwr.clients.sum_store import SumStore
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.trust import ANYBODY
from fedlora_flwr.errors import InvalidValue, OrderRefused, refusing
from fedlora_flwr.secure_sum.cohort import check_union, honest_shares
from fedlora_flwr.secure_sum.party import SEALED_BYTES, Advertised, Masked, Shared, pieces
from fedlora_flwr.secure_sum.shamir import SHARE_BYTES
from fedlora_flwr.secure_sum.terms import CARD_BYTES, Terms
from fedlora_flwr.wire import OPEN_SUM, SEAL_SHARES, SHOW_KEYS, STAGE
from fedlora_flwr.wire.limits import Residues
from fedlora_flwr.wire.order import Order

_PEER = 64  # hexadecimal digits


def shares_of(order: Order, config: RunConfig) -> int:
    """Return m, the number of shares of a sum's noise, if this client takes part.

    Raises
    ------
    OrderRefused
        This client adds all of its noise itself, the order lacks a value, too few clients would
        share the noise, or the sum has more records than this client's δ allows.
    """
    if not config.secure_sum:
        raise OrderRefused(
            "The message asks for a share of a secure sum, but this run has trust-model = "
            "'local'. Set trust-model = 'secure-sum' for the run and on the device."
        )
    if not (order.plan and order.cohort and order.sum_noise and order.grid_norm):
        raise OrderRefused(
            "A secure sum needs a plan, the number of clients asked, the noise of the sum and the "
            "grid's norm in the message. Use one of this package's strategies."
        )
    with refusing():
        shares = honest_shares(order.cohort, config.dropouts, config.colluding)
        check_union(config.delta, max(config.sum_records, 1), config.unit)
    if shares < config.least_shares:
        raise OrderRefused(
            f"The noise would be shared among {shares} clients ({order.cohort} asked, less "
            f"dropouts = {config.dropouts} and colluding = {config.colluding}), but this client "
            f"needs at least least-shares = {config.least_shares}. Ask more clients."
        )
    return shares


@dataclass(frozen=True)
class SumExchange:
    """One client's side of the masked sums of one run.

    Parameters
    ----------
    config : RunConfig
        The run's configuration on this client.
    client : str
        Stable identity of the client's records.
    run : str
        Identity of the run.
    store : SumStore
        Keeps secrets until the next message.
    """

    config: RunConfig
    client: str
    run: str
    store: SumStore

    def answer(self, order: Order) -> bytes:
        """Answer a message that asks for keys, for sealed shares, or to open the sum.

        Parameters
        ----------
        order : Order
            The order. Its packet holds the cards of the round, or one byte per card that tells
            whether the card's client has uploaded.

        Returns
        -------
        bytes
            This client's card; or one piece for each card: what it seals, or what it reveals.

        Raises
        ------
        OrderRefused
            This client takes no part in such a sum, or the message is not the next one.
        InvalidValue
            This client's own list of peers, or its identity, cannot be used. The text names the
            client's files, so a server must not read it.
        """
        shares_of(order, self.config)
        with refusing():
            if not self.config.sum_records:
                allowed = "at least 1: the most records of all clients together, set by the run"
                raise InvalidValue("sum-records", 0, allowed)
        if order.stage == SHOW_KEYS:
            return self._show_keys(order)
        peers = self._peers() if order.stage == SEAL_SHARES else None
        with refusing():
            return self._answered(order, peers)

    def _show_keys(self, order: Order) -> bytes:
        peers, identity = self._peers(), self.store.identity()
        own = identity.public_key().public_bytes_raw()
        if peers is not None and own not in peers:
            allowed = f"a list with this client's own identity, {own.hex()}"
            raise InvalidValue("peers", self.config.peers, allowed)
        with refusing():
            advertised = Advertised.begin(Terms.of(order, self.config), identity)
        self.store.keep(self.client, self.run, advertised)
        return advertised.card

    def _answered(self, order: Order, peers: frozenset[bytes] | None) -> bytes:
        if order.stage == SEAL_SHARES:
            cards = pieces(order.packet, CARD_BYTES)
            found = self.store.take(self.client, self.run, Advertised)
            shared, sealed = found.share(Terms.of(order, self.config), cards, peers)
            self.store.keep(self.client, self.run, shared)
            return b"".join(sealed)
        if order.stage == OPEN_SUM:
            masked = self.store.take(self.client, self.run, Masked)
            revealed = masked.reveal([i for i, flag in enumerate(order.packet) if flag])
            nothing = bytes(SHARE_BYTES)
            return b"".join(revealed.get(i, nothing) for i in range(len(order.packet)))
        raise InvalidValue(STAGE, order.stage, f"{SHOW_KEYS}, {SEAL_SHARES} or {OPEN_SUM}")

    def masks(self, order: Order) -> Masks:
        """Take the masks for the upload of a round, before anything private is read.

        Raises
        ------
        OrderRefused
            The message is not the next one of a sum that this client agreed to.
        """
        with refusing():
            shared = self.store.take(self.client, self.run, Shared)
            terms = Terms.of(order, self.config)
            kept = shared.open_shares(terms, pieces(order.packet, SEALED_BYTES))
            return Masks(self, shared, kept)

    def _peers(self) -> frozenset[bytes] | None:
        """Return the identities of the clients that this one accepts; ``None`` for any."""
        if self.config.peers == ANYBODY:
            return None
        if not self.config.peers:
            allowed = f"a file with the identities of all clients, or {ANYBODY!r}"
            raise InvalidValue("peers", self.config.peers, allowed)
        return read_peers(Path(self.config.peers))


@dataclass(frozen=True)
class Masks:
    """The masks of one upload.

    Parameters
    ----------
    exchange : SumExchange
        The client's exchange.
    shared : Shared
        The client's keys.
    kept : Masked
        The state that the client keeps for the last message.
    """

    exchange: SumExchange
    shared: Shared
    kept: Masked

    def on(self, shares: Mapping[str, Residues]) -> dict[str, Residues]:
        """Return the masked upload, and keep the state with which the sum may be opened."""
        masked = self.shared.masked(shares, self.kept)
        exchange = self.exchange
        exchange.store.keep(exchange.client, exchange.run, self.kept)
        return masked


def read_peers(path: Path) -> frozenset[bytes]:
    """Read a list of identities: one per line, first 64 hexadecimal digits, then any text.

    Raises
    ------
    InvalidValue
        The file cannot be read, holds no identity, or has a line without one.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidValue("peers", str(path), f"a text file that can be read ({error})") from error
    found = set()
    for number, line in enumerate(lines, 1):
        first = (line.split("#", 1)[0].split() or [""])[0]
        try:
            if first and len(first) != _PEER:
                raise ValueError("wrong length")
            found |= {bytes.fromhex(first)} if first else set()
        except ValueError as error:
            allowed = f"a line that begins with an identity of {_PEER} hexadecimal digits"
            raise InvalidValue(f"line {number} of {path}", line[:80], allowed) from error
    if not found:
        raise InvalidValue("peers", str(path), "a file with at least one identity")
    return frozenset(found)
