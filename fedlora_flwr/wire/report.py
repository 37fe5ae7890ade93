"""`Report`: everything that a client may answer, with its writer and its parser.

This module does not depend on Flower. `fedlora_flwr.wire.records` puts a report in Flower's
records, and a NumPyClient's ``fit`` returns it as flat scalars.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, cast

from numpy.typing import NDArray

from fedlora_flwr import wire
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.wire import limits
from fedlora_flwr.wire.checks import checked_arrays, checked_notes, checked_shares
from fedlora_flwr.wire.limits import NAME, Number, Packet, Text, shown

Scalars = dict[str, bool | bytes | float | int | str]
Arrays = Mapping[str, NDArray[Any]]

FURTHER = "…"
"""Placeholder for words that a project defines itself."""
DEVICE, RUN, PACKAGE = "device", "run", "package"
_FURTHER = Number(-limits.MOST_NUMBER, limits.MOST_NUMBER)


def _row(
    default: Any, decides: str, why: str, word: str = "", limit: Number | Text | Packet | str = ""
) -> Any:
    """Make a field with who decides it on a device, the reason, its word and its limit."""
    metadata = {
        "decides": decides,
        "allowed": limit if isinstance(limit, str) else limit.allowed,
        "why": why,
        "word": word,
        "limit": None if isinstance(limit, str) else limit,
    }
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Report:
    """A client's answer to a train, evaluate or query message.

    Each field's metadata tell who decides it on a device (``decides``), which values are allowed
    (``allowed``) and why (``why``). A field that is None or empty is not sent.

    Parameters
    ----------
    client : str
        Name of the client.
    status : str
        ``"ok"``, empty, or ``"budget-exhausted"``. In the last case the arrays are ignored.
    arrays : Mapping[str, ndarray]
        The arrays that trained.
    shares : Mapping[str, ndarray]
        Arrays of whole numbers modulo 2³² that replace ``arrays`` under a secure sum. They have a
        meaning only in the sum over all clients.
    packet : bytes
        A message of a masked sum to the other clients: a card, sealed shares, or the secrets that
        open the sum.
    epsilon, epsilon_budget, delta, accountant, steps
        The client's account in its ledger (see `fedlora_flwr.privacy.ledger.LedgerSummary`).
    seconds : float
        Wall-clock time of the round.
    peak_memory_mb : float
        Largest resident memory of the client's process so far, MiB.
    weight : float
        Aggregation weight.
    num_examples : int
        Number of records, where the run's weighting makes it public; otherwise 1.
    unprotected : Mapping[str, float]
        Metrics on private records *without* protection, by name.
    measured : Mapping[str, float]
        Figures of an evaluation, and further numbers that a project's own client reports.
    notes : Mapping
        Further texts, flags and bytes that a project's own client reports.
    """

    client: str = _row(
        "",
        DEVICE,
        "Budget and cohorts belong to the data, which only the device can name; the server binds "
        "the name to the node's key.",
        wire.CLIENT,
        NAME,
    )
    status: str = _row(
        "",
        PACKAGE,
        "A client whose budget is spent says so instead of failing.",
        wire.STATUS,
        Text(limits.LONGEST_NAME, (wire.STATUS_OK, wire.STATUS_EXHAUSTED)),
    )
    arrays: Mapping[str, NDArray[Any]] = _row(
        {},
        RUN,
        "The plan decides what trains; the values come from private steps and post-processing.",
        wire.ARRAYS,
        f"up to {limits.MOST_ARRAYS} named arrays of fp16, fp32 or fp64, together "
        f"{limits.MOST_ENTRIES} finite entries of at most {limits.MOST_UPLOADED_ENTRY:g} in "
        "absolute value",
    )
    shares: Mapping[str, NDArray[Any]] = _row(
        {},
        RUN,
        "They leave only where the device's file says trust-model = 'secure-sum'.",
        wire.SHARES,
        f"up to {limits.MOST_ARRAYS} named arrays of uint32, together {limits.MOST_ENTRIES} "
        "entries",
    )
    packet: bytes = _row(
        b"",
        PACKAGE,
        "New keys and sealed shares of them tell nothing about a record.",
        wire.PACKET,
        Packet(limits.LONGEST_PACKET),
    )
    epsilon: float | None = _row(
        None,
        PACKAGE,
        "The ledger's own account; an ε above 1e6 promises nothing.",
        wire.EPSILON,
        Number(0, 1e6, unbounded=True),
    )
    epsilon_budget: float | None = _row(
        None,
        DEVICE,
        "The device's file states the budget of its data.",
        wire.EPSILON_BUDGET,
        Number(0, 1e6, unbounded=True),
    )
    delta: float | None = _row(
        None,
        DEVICE,
        "The device's file states the δ of its ε.",
        wire.DELTA,
        Number(0, 1),
    )
    accountant: str = _row(
        "",
        PACKAGE,
        "An ε means nothing without its accountant.",
        wire.ACCOUNTANT,
        Text(64),
    )
    steps: int | None = _row(
        None,
        PACKAGE,
        "The server refuses a client whose ledger has lost rows.",
        wire.STEPS,
        Number(0, 1e12, whole=True),
    )
    seconds: float | None = _row(
        None,
        PACKAGE,
        "Operators find slow devices by it; it is a side channel.",
        wire.SECONDS,
        Number(0, 1e9),
    )
    peak_memory_mb: float | None = _row(
        None,
        PACKAGE,
        "Operators plan memory by it; it is a side channel.",
        wire.PEAK_MEMORY,
        Number(0, 1e9),
    )
    weight: float | None = _row(
        None,
        DEVICE,
        "It tells n or σ, which leave only if the device agrees to the run's weighting.",
        wire.WEIGHT,
        Number(0, limits.MOST_WEIGHT, above=True),
    )
    num_examples: int | None = _row(
        None,
        DEVICE,
        "The number of records leaves only if the device agrees to weighting by size.",
        wire.NUM_EXAMPLES,
        Number(0, limits.MOST_RECORDS, whole=True),
    )
    unprotected: Mapping[str, float] = _row(
        {},
        DEVICE,
        "Metrics on private records are not protected, so the device's file must ask for them.",
        wire.UNPROTECTED + FURTHER,
        f"up to {limits.MOST_NUMBERS} further numbers together, each {_FURTHER.allowed}",
    )
    measured: Mapping[str, float] = _row(
        {},
        DEVICE,
        "An evaluation's figures, if the device's file names its records; a project's own client "
        "may report further numbers here, but this package's client does not.",
        FURTHER,
        f"up to {limits.MOST_NUMBERS} further numbers together, each {_FURTHER.allowed}",
    )
    notes: Mapping[str, bool | bytes | str] = _row(
        {},
        PACKAGE,
        "A project's own client may add notes, which the server only writes down; this package's "
        "client does not.",
        FURTHER,
        f"up to {limits.MOST_NOTES} flags, texts of at most {limits.LONGEST_TEXT} printable "
        f"characters, or up to {limits.LONGEST_BYTES} bytes",
    )

    # The writer.

    def numbers(self) -> dict[str, int | float]:
        """Return all single numbers, by their words on the wire."""
        own = {word: getattr(self, name) for word, name in _words(Number).items()}
        rest = {wire.UNPROTECTED + name: value for name, value in self.unprotected.items()}
        return {**_present(own), **rest, **self.measured}

    def figures(self) -> dict[str, float]:
        """Return the figures of an evaluation, by their words on the wire."""
        own = {wire.UNPROTECTED + name: value for name, value in self.unprotected.items()}
        return {**own, **self.measured}

    def texts(self) -> dict[str, bool | bytes | str]:
        """Return all texts and flags, by their words on the wire."""
        own = {word: getattr(self, name) for word, name in _words(Text, Packet).items()}
        return {**_present(own), **self.notes}

    def to_fit(self) -> tuple[list[NDArray[Any]], int, Scalars]:
        """Return the result of a NumPyClient's ``fit``: arrays, number of examples, flat metrics.

        In this form the arrays have no names, so the metrics hold the names, separated by commas.
        """
        numbers = self.numbers()
        examples = int(numbers.pop(wire.NUM_EXAMPLES, 1))
        flat: Scalars = {**numbers, **self.texts(), wire.NAMES: ",".join(self.arrays)}
        return list(self.arrays.values()), examples, flat

    # The parser.

    @classmethod
    def of_fit(
        cls,
        arrays: Sequence[NDArray[Any]],
        sent: Iterable[str],
        metrics: Mapping[str, object],
        examples: object,
    ) -> Report:
        """Read the result of a NumPyClient's ``fit``, unchecked (see `checked`).

        Parameters
        ----------
        arrays, metrics, examples
            The result of ``fit``.
        sent : Iterable[str]
            Names of the arrays that the client was sent. They are used unless the client's metrics
            name the uploaded arrays.

        Raises
        ------
        InvalidValue
            The numbers of names and arrays differ, or a word has another type.
        """
        flat = dict(metrics)
        names = [n for n in str(flat.pop(wire.NAMES, ",".join(sent))).split(",") if n]
        if len(names) != len(arrays):
            allowed = f"one for each of {len(names)} names"
            raise InvalidValue("uploaded arrays", len(arrays), allowed)
        return cls.of_scalars(flat, examples, dict(zip(names, arrays, strict=True)))

    @classmethod
    def of_scalars(
        cls, metrics: Mapping[str, object], examples: object, arrays: Arrays | None = None
    ) -> Report:
        """Read a NumPyClient's flat metrics, unchecked (see `checked`)."""
        numbers: dict[str, object] = {wire.NUM_EXAMPLES: examples}
        texts: dict[str, object] = {}
        for name, value in metrics.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if name != wire.NUM_EXAMPLES:
                (numbers if number else texts)[name] = value
        return cls.of_words(arrays or {}, numbers, texts)

    @classmethod
    def of_words(
        cls, arrays: Arrays, numbers: Mapping[str, object], texts: Mapping[str, object]
    ) -> Report:
        """Make a report from words and values, unchecked (see `checked`).

        Raises
        ------
        InvalidValue
            A word for a number came as a text, a word for a text came as a number, or a text that
            must not be empty is empty.
        """
        found: dict[str, Any] = {
            "arrays": {n: a for n, a in arrays.items() if a.dtype != limits.RESIDUE},
            "shares": {n: a for n, a in arrays.items() if a.dtype == limits.RESIDUE},
        }
        further: dict[str, dict[str, object]] = {"unprotected": {}, "measured": {}, "notes": {}}
        by_number, by_text = _words(Number), _words(Text, Packet)
        for word, value in numbers.items():
            if word in by_text:
                raise InvalidValue(word, shown(value), "a text")
            if word in by_number:
                found[by_number[word]] = value
            elif word.startswith(wire.UNPROTECTED):
                further["unprotected"][word.removeprefix(wire.UNPROTECTED)] = value
            else:
                further["measured"][word] = value
        for word, value in texts.items():
            if word in by_number or word == wire.NAMES:
                raise InvalidValue(word, shown(value), "a number among the metrics")
            if word in by_text and value in ("", b""):
                raise InvalidValue(word, value, _text_limit(word).allowed)
            if word in by_text:
                found[by_text[word]] = value
            else:
                further["notes"][word] = value
        return cls(**found, **cast(Any, further))

    def checked(self) -> Report:
        """Check every value against its limits, and return the report with arrays in fp32.

        Raises
        ------
        InvalidValue
            A value has another type, is not finite or is out of range; there are too many values;
            or ε is above its budget. The error names the field, the value and the allowed values.
        """
        values: dict[str, Any] = {}
        for entry in fields(self):
            value, limit = getattr(self, entry.name), entry.metadata["limit"]
            if limit is not None and not (value is None or value == entry.default):
                values[entry.name] = limit.read(entry.metadata["word"], value)
        count = len(self.unprotected) + len(self.measured)
        if count > limits.MOST_NUMBERS:
            raise InvalidValue("further numbers", count, f"at most {limits.MOST_NUMBERS}")
        for name in ("unprotected", "measured"):
            given = getattr(self, name)
            values[name] = {NAME.read("name", n): _FURTHER.read(n, v) for n, v in given.items()}
        values["notes"] = checked_notes(self.notes)
        values["arrays"] = checked_arrays(self.arrays)
        values["shares"] = checked_shares(self.shares)
        found = replace(self, **values)
        if None not in (found.epsilon, found.epsilon_budget) and not (
            cast(float, found.epsilon) <= cast(float, found.epsilon_budget) * (1 + 1e-9)
        ):
            allowed = f"at most the budget, {found.epsilon_budget:g}"
            raise InvalidValue(wire.EPSILON, found.epsilon, allowed)
        return found


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        word: value
        for word, value in values.items()
        if value is not None and value not in ("", b"")
    }


@lru_cache
def _words(*kinds: type[Number | Text | Packet]) -> dict[str, str]:
    """Return the names of the fields whose limits are of these types, by word on the wire."""
    rows = [(entry.metadata["word"], entry.name, entry.metadata["limit"]) for entry in _rows()]
    return {word: name for word, name, limit in rows if isinstance(limit, kinds)}


def _rows() -> tuple[Any, ...]:
    assert all(entry.default is not MISSING or entry.default_factory for entry in fields(Report))
    return fields(Report)


def _text_limit(word: str) -> Text | Packet:
    """Return the limit of a field of text or bytes, by its word on the wire."""
    (found,) = [entry.metadata["limit"] for entry in _rows() if entry.metadata["word"] == word]
    return cast(Text | Packet, found)
