"""The tables of what leaves a device under a secure sum, and of what files then hold.

They are those of `wire_table` and `wire_files`, with other rows where a sum has other fields. The
attacker is the server, which may send anything, so no row trusts what an order says: a packet must
have the one form that its stage allows, and arrays are masked or do not leave.
"""

from __future__ import annotations

from typing import Any, cast

from fedlora_flwr import wire
from fedlora_flwr.secure_sum.party import SEALED_BYTES, pieces
from fedlora_flwr.secure_sum.shamir import SHARE_BYTES
from fedlora_flwr.secure_sum.terms import CARD_BYTES, Card
from tests.deploy.masked_heard import Answer, MaskedHeard
from tests.deploy.wire_files import ROUNDS
from tests.deploy.wire_heard import Heard, asked_for
from tests.deploy.wire_table import FAILED, PROTECTED, PUBLIC, REFUSED, TABLE, Row
from tests.deploy.wire_tap import Call

# What a server of the other trust model and the curious one (see `curious`) are answered.
REFUSALS = (
    "trust-model = 'local' is refused: this device's file has another value of trust-model. Run "
    "what its owner agreed to.'>",
    "A loss on private records is not protected. Evaluate on the server's public test set "
    "(fraction_evaluate = 0), or set report-unprotected-metrics = true.'>",
    "The message has 2 ConfigRecords. Send exactly one.'>",
    "The messages of the secure sum came twice or in another order. This client has forgotten its "
    "keys of the round. Begin the round again.'>",
    "weighting = 'size' is refused, because this client does not tell the run its number of "
    "records or its noise. Use weighting = 'uniform', or set weighting on the client.'>",
)


def _masked(value: Any, heard: Heard, call: Call) -> bool:
    """Whether an array's bytes are of a masked upload of exactly what the order's plan trains."""
    for answer in cast(MaskedHeard, heard).of_stage(wire.UPLOAD):
        made = {name: words for name, words in answer.shares.items() if name != wire.NUM_EXAMPLES}
        if value in answer.chunks and len(made) == len(answer.shares) - 1:
            return asked_for(answer.order, dict(answer.start), made)  # type: ignore[arg-type]
    return False


def _packet(value: Any, heard: Heard, call: Call) -> bool:
    """Whether a packet has the form that its stage allows, and no byte beside."""
    found = [one for one in cast(MaskedHeard, heard).answers if one.packet == value]
    fits = {wire.SHOW_KEYS: _card, wire.SEAL_SHARES: _sealed, wire.OPEN_SUM: _revealed}
    return bool(found) and all(
        one.order.stage in fits and fits[one.order.stage](one, cast(MaskedHeard, heard))
        for one in found
    )


def _card(answer: Answer, heard: MaskedHeard) -> bool:
    if len(answer.packet) != CARD_BYTES:
        return False
    card = Card.from_bytes(answer.packet)
    return card.is_signed(heard.terms(answer.order)) and card.identity == heard.identity


def _sealed(answer: Answer, heard: MaskedHeard) -> bool:
    """One sealed piece for each other card: as long as the design says, and no two alike."""
    cards = pieces(answer.order.packet, CARD_BYTES)
    sealed = pieces(answer.packet, SEALED_BYTES)
    own = [Card.from_bytes(card).identity for card in cards].index(heard.identity)
    filled = [place for place, piece in enumerate(sealed) if any(piece)]
    others = [place for place in range(len(cards)) if place != own]
    return filled == others and len({sealed[place] for place in others}) == len(others)


def _revealed(answer: Answer, heard: MaskedHeard) -> bool:
    """One share for each card, which is one secret's: there is no room for both of a client."""
    shares = pieces(answer.packet, SHARE_BYTES)
    return len(shares) == len(answer.order.packet) and len(set(shares)) == len(shares)


def _reason(value: Any, heard: Heard, call: Call) -> bool:
    refused = value.startswith(REFUSED) and value.removeprefix(REFUSED) in REFUSALS
    return refused or FAILED.fullmatch(value) is not None


_REASON = Row(
    PUBLIC, "A refusal before records are opened, or a fixed sentence with a random number.",
    _reason,
)  # fmt: skip
_CHANGED = {
    "Message.error.reason": _REASON,
    "push-messages.messages_list.error.reason": _REASON,
    "ArrayRecord.…": Row(
        PUBLIC, "The names of arrays that the order asks for, and of the number of records.",
        lambda v, heard, c: v[0] in {*heard.names, wire.NUM_EXAMPLES} and v[1] in heard.pushed,
    ),
    "Array.dtype": Row(PUBLIC, "Whole numbers modulo 2³².", lambda v, h, c: v == "uint32"),
    "Array.shape": Row(
        PUBLIC, "As in the server's arrays; the number of records is one number.",
        lambda v, heard, c: tuple(v) in {*heard.shapes, (1,)},
    ),
    "ArrayChunk.data": Row(
        PROTECTED, "Words under masks; only the sum over the round's devices is opened.", _masked
    ),
    f"MetricRecord.{wire.STEPS}": Row(
        PUBLIC, "The steps that runs have planned and rounds have taken.",
        lambda v, h, c: v in (1, 2, 3),
    ),
    f"MetricRecord.{wire.DELTA}": Row(PUBLIC, "The device's file.", lambda v, h, c: v == 1e-3),
    f"ConfigRecord.{wire.PACKET}": Row(
        PUBLIC, "Signed new keys; then sealed shares of secrets; then one share of one secret of "
        "each device.",
        _packet,
    ),
}  # fmt: skip
_OPTED = (f"{wire.UNPROTECTED}…", wire.LOSS, "accuracy")
_NEVER = {f"MetricRecord.{name}" for name in _OPTED}  # No device's file allows them here.
MASKED: dict[str, Row] = {
    name: row for name, row in {**TABLE, **_CHANGED}.items() if name not in _NEVER
}
MASKED_ROUNDS = ROUNDS | {
    "shares": (PUBLIC, "The server's own count of uploads in the sum."),
    "opened": (PUBLIC, "Whether the sum was opened."),
}
