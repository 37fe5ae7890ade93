"""`Order`: everything that a server may send in a message in addition to the arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.algebra.last_arrays import OfLastArrays
from fedlora_flwr.errors import InvalidValue, OrderRefused, refusing
from fedlora_flwr.layout import Layout, factor_of, is_folded, is_shared
from fedlora_flwr.plan import A, B, ComponentPlan
from fedlora_flwr.wire import (
    COHORT,
    CONTINUES,
    FINGERPRINT,
    GRID_NORM,
    MOST_ENTRY,
    NAMES,
    OWN,
    PACKET,
    PLAN,
    PROXIMAL,
    ROUND,
    SHARE,
    STAGE,
    STAGES,
    START_FROM,
    SUM_NOISE,
    WEIGHTING,
    WEIGHTINGS,
)
from fedlora_flwr.wire.limits import LONGEST_PACKET, Number, Packet, Text, shown, within

Arrays = Mapping[str, NDArray[np.generic]]
Scalar = bool | bytes | float | int | str

MOST_ROUND = 1_000_000
MOST_COHORT = 1_000_000
LONGEST_PLAN = 100_000  # characters
LONGEST = 128
LONGEST_NAMES = 10_000_000  # characters of all names together
ARRAYS_ALLOWED = (
    "the model's arrays, each once, and folded pairs, with the model's names and shapes at the "
    f"run's rank; floating-point numbers, all finite and at most {MOST_ENTRY:g} in magnitude"
)
ARRAYS_WHY = "Training starts from them; the private step holds at any weights within the limit."
# Flower's own mods leave these keys in a message. They concern the upload, and act after this
# client has answered.
FLOWERS = ("clipping_norm", "norm_bit")


def _row(key: str, default: Any, limit: Number | Text | Packet, why: str) -> Any:
    """Make a field with its word on the wire, its limit, and the reason why the run decides it."""
    allowed = limit.allowed if isinstance(limit, Number) else f"empty, or {limit.allowed}"
    return field(
        default=default,
        metadata={
            "key": key, "limit": limit, "allowed": allowed, "why": why, "decides": "run",
        },
    )  # fmt: skip


@dataclass(frozen=True)
class Order:
    """A server's request in one message.

    A missing field has its default, which fits a server that does not use this package's
    strategies. Unknown keys in a message's configuration are refused, so none is silently ignored.

    Parameters
    ----------
    server_round : int
        Round, from 1; 0 if the server does not send it.
    plan : str
        The arrays that train, per step (see `ComponentPlan`). If a server sends no plan, it is
        empty: both factors train and all arrays are returned, as plain averaging expects.
    names : str
        Names of the arrays, separated by commas, if the message's arrays have no names.
    weighting : str
        The aggregation weight to report.
    fingerprint : str
        Hash of the server's backbone; empty if the server does not send it.
    share : str
        The factors that are exchanged, ``"A"``, ``"B"`` or ``"AB"``; all other arrays that train
        stay with the client. If empty, all arrays that train are exchanged.
    cohort : int
        Under a secure sum, the number of clients that the round asks; otherwise 0.
    sum_noise : float
        Under a secure sum, the noise multiplier σ of the sum, the same for all clients; otherwise
        0.
    grid_norm : int
        Under a secure sum, the clip norm in units of the round's grid; otherwise 0.
    stage : str
        Under a masked sum, the stage of its protocol to which this message belongs.
    packet : bytes
        Under a masked sum, the bytes that others sent for this client (see
        `fedlora_flwr.secure_sum.party`).
    proximal_mu : float
        μ of the term μ/2 ‖w − w₀‖² that is added to the local objective, where w₀ are the message's
        arrays (FedProx, arXiv 1812.06127); 0 for no such term.
    start_from : str
        ``"own"`` if each client keeps all that it trains, and starts from what it kept in its last
        round; the message's arrays then are w₀ of the proximal term, and the start of a client that
        has kept nothing. If empty, training starts from the message's arrays.
    continues : str
        Identity of the run that this run continues, with the same plan, budget and local arrays.
        Empty if it continues no run.

    Raises
    ------
    InvalidValue
        A field has another type, or is out of range.
    """

    server_round: int = _row(
        ROUND, 0, Number(0, MOST_ROUND, whole=True),
        "It names the round in the ledger; the budget does not read it.",
    )  # fmt: skip
    plan: str = _row(
        PLAN, "", Text(LONGEST_PLAN), "Everything that trains is clipped together under any plan."
    )
    names: str = _row(
        NAMES, "", Text(LONGEST_NAMES), "Arrays with other names or shapes are refused."
    )
    weighting: str = _row(
        WEIGHTING, "uniform", Text(LONGEST, WEIGHTINGS),
        "A device tells its size or its noise only where its file says so.",
    )  # fmt: skip
    fingerprint: str = _row(
        FINGERPRINT, "", Text(LONGEST), "A device whose frozen weights differ takes no part."
    )
    share: str = _row(
        SHARE, "", Text(LONGEST, (A, B, A + B)),
        "What stays with the client went through the same private steps.",
    )  # fmt: skip
    cohort: int = _row(
        COHORT, 0, Number(1, MOST_COHORT, whole=True),
        "It decides a client's share of the noise; the device's file limits how small a share is.",
    )  # fmt: skip
    sum_noise: float = _row(
        SUM_NOISE, 0.0, Number(1e-3, 1e6),
        "A device refuses less noise than its budget needs, and its ledger counts this noise.",
    )  # fmt: skip
    grid_norm: int = _row(
        GRID_NORM, 0, Number(1 << 10, 1 << 20, whole=True),
        "The noise fits any grid, and rounding never lengthens a record's gradient beyond C.",
    )  # fmt: skip
    stage: str = _row(
        STAGE, "", Text(LONGEST, STAGES),
        "A device accepts these messages in one order only, and otherwise uploads nothing.",
    )  # fmt: skip
    packet: bytes = _row(
        PACKET, b"", Packet(LONGEST_PACKET),
        "Keys are signed by the clients in the device's list, and shares are sealed for it.",
    )  # fmt: skip
    proximal_mu: float = _row(
        PROXIMAL, 0.0, Number(0, 1e3),
        "The pull is added after the noise, and the server knows the arrays that it uses.",
    )  # fmt: skip
    start_from: str = _row(
        START_FROM, "", Text(LONGEST, (OWN,)),
        "What a client has kept went through the same private steps.",
    )  # fmt: skip
    continues: str = _row(
        CONTINUES, "", Text(LONGEST),
        "Rounds count in the plan of that run, which is fixed, and a server can start runs anyway.",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for entry in fields(self):
            _check(entry, getattr(self, entry.name))

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> Order:
        """Read the configuration of a message.

        Parameters
        ----------
        config : Mapping
            Keys and values as they came. None of them is trusted.

        Raises
        ------
        OrderRefused
            A key is unknown, or a value has another type or is out of range.
        """
        known = {str(entry.metadata["key"]): entry.name for entry in fields(cls)}
        given = {}
        for key, value in config.items():
            if key in known:
                given[known[key]] = _widened(getattr(cls, known[key]), value)
            elif key not in FLOWERS:
                raise OrderRefused(
                    f"The message's configuration has the key {str(key)[:80]!r}, which this client "
                    f"does not know. It reads {', '.join(known)}."
                )
        with refusing():
            return cls(**given)  # type: ignore[arg-type]

    def to_config(self) -> dict[str, Scalar]:
        """Return the configuration that `from_config` reads, without the defaults."""
        return {
            str(entry.metadata["key"]): getattr(self, entry.name)
            for entry in fields(self)
            if getattr(self, entry.name) != entry.default
        }

    def plan_for(self, layout: Layout) -> ComponentPlan | None:
        """Return the plan, or ``None`` if the server sent no plan.

        Raises
        ------
        OrderRefused
            The text is not a plan, or the plan does not fit these arrays.
        """
        if not self.plan:
            return None
        with refusing():
            return _plan(self.plan, layout)

    @property
    def keeps(self) -> bool:
        """Whether a part of the model, or all of it, stays with each client between rounds."""
        return bool(self.share or self.start_from)

    def stays(self, name: str) -> bool:
        """Tell whether the client keeps an array for its next round."""
        return bool(self.start_from) or not self.leaves(name)

    def leaves(self, name: str) -> bool:
        """Tell whether an array is exchanged."""
        return is_shared(name, self.share)


@lru_cache(maxsize=8)
def _plan(text: str, layout: Layout) -> ComponentPlan:
    plan = ComponentPlan.parse(text)
    layout.check_plan(plan)
    return plan


def _widened(default: object, value: object) -> object:
    """Turn an int into a float if the field is a float: Flower sends a user's 1 as an int."""
    if type(default) is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    return value


def _check(entry: Field[Any], value: object) -> None:
    about = entry.metadata
    if type(value) is not type(entry.default):
        raise InvalidValue(about["key"], shown(value), about["allowed"])
    if value != entry.default:
        about["limit"].read(about["key"], value)


def named_arrays(
    names: Sequence[str], arrays: Sequence[NDArray[np.generic]]
) -> dict[str, NDArray[np.float32]]:
    """Return a message's arrays by name, and refuse arrays that no model can hold.

    Parameters
    ----------
    names, arrays : Sequence
        Names and arrays, in the same order.

    Returns
    -------
    dict[str, ndarray]
        The arrays in fp32.

    Raises
    ------
    OrderRefused
        The numbers of names and arrays differ; a name comes twice; or an array has entries that are
        not finite floating-point numbers of at most ``MOST_ENTRY`` in magnitude.
    """
    if len(names) != len(arrays):
        raise OrderRefused(
            f"The message has {len(arrays)} arrays and {len(names)} names. Send one name per array."
        )
    found = {}
    for name, array in zip(names, arrays, strict=True):
        if name in found:
            raise OrderRefused(f"The array {name[:200]!r} came twice. Send each array once.")
        found[name] = array
    return dict(_in_fp32(found))


def _numbers(name: str, array: NDArray[np.generic]) -> NDArray[np.float32]:
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise OrderRefused(
            f"The array {name[:200]!r} is of type {getattr(array, 'dtype', type(array))}. "
            "Send floating-point numbers."
        )
    if not within(array, MOST_ENTRY):
        raise OrderRefused(
            f"The array {name[:200]!r} has entries that are not finite, or above {MOST_ENTRY:g} in "
            "magnitude. The run has diverged: lower its learning rates."
        )
    return np.asarray(array, np.float32)


# In one process, the clients of a round get the same objects.
_in_fp32 = OfLastArrays(
    lambda arrays: {name: _numbers(name, array) for name, array in arrays.items()}
)


def check_shapes(arrays: Arrays, own: Arrays, rank: int) -> None:
    """Refuse arrays whose names and shapes are not those of the model.

    Parameters
    ----------
    arrays : Mapping[str, ndarray]
        A message's arrays, including folded pairs, and the arrays that stay with the client.
    own : Mapping[str, ndarray]
        The model's arrays; their rank may differ from ``rank``.
    rank : int
        LoRA rank r of the factors.

    Raises
    ------
    OrderRefused
        An array is missing or unknown, or has another shape.
    """
    for name in own:
        if name not in arrays:
            there = str(sorted(arrays)[:2])[:200]
            raise OrderRefused(
                f"The array {name!r} is missing, and the message has {there}. "
                "Send all that the model trains, by the names of `AdaptedModel.read`: without "
                "PEFT's prefix 'base_model.model.'."
            )
    layers = {name.rsplit(".lora_", 1)[0]: name for name in own if factor_of(name)}
    for name, array in arrays.items():
        if name in own:
            good = array.shape == _shape(name, own[name].shape, rank)
        elif is_folded(name) and (layer := name.rsplit(".folded_", 1)[0]) in layers:
            good = _folds(layer, arrays, own)
        else:
            raise OrderRefused(
                f"The array {name[:200]!r} is not one of the model's. Server and device must adapt "
                "the same layers."
            )
        if not good:
            raise OrderRefused(
                f"The shape of {name[:200]} is {array.shape}, which does not fit the model at rank "
                f"{rank}. Server and device must have the same model, classes and rank."
            )


def _shape(name: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    factor = factor_of(name)
    if factor == A:
        return (rank, *shape[1:])
    return (*shape[:-1], rank) if factor == B else shape


def _folds(layer: str, arrays: Arrays, own: Arrays) -> bool:
    """Tell whether a layer's folded pair fits its frozen weight."""
    b, a = (arrays.get(f"{layer}.folded_{factor}.weight") for factor in (B, A))
    if a is None or b is None or a.ndim != 2 or b.ndim != 2:
        return False
    rows = own[f"{layer}.lora_B.weight"].shape[0]
    columns = own[f"{layer}.lora_A.weight"].shape[1]
    ranks = {a.shape[0], b.shape[1]}
    fits = b.shape[0] == rows and a.shape[1] == columns
    return fits and len(ranks) == 1 and max(ranks) <= min(rows, columns)
