"""From a privacy budget to a noise multiplier, and from steps taken to ε spent.

ε is per client, under Poisson sampling, for one record whose gradient is replaced by zero (zero-out
adjacency). The number of records, the batch size and the sampling rate are public and do not
change. `fedlora_flwr.privacy.accountants` says why PRV in both directions covers this.

Results are kept in memory and in small files in ``$XDG_CACHE_HOME/fedlora/accounting``, which all
processes share. A file is used only if its inputs, library versions and source code are those in
use and its checksum is right. This guards against stale and damaged files, not against a person who
may write to the user's cache.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from fedlora_flwr.config.unit import RECORD
from fedlora_flwr.errors import FedLoRAError, InvalidValue, unknown
from fedlora_flwr.files import cache_folder, private_folder, replace_file
from fedlora_flwr.privacy import accountants, loss_grid
from fedlora_flwr.privacy.accountants import ACCOUNTANTS, Segment, merge, pld_epsilon, rdp_epsilon

__all__ = ["AccountantsDisagree", "Segment", "Spent", "calibrate", "check_budget", "epsilon_spent"]

_TOLERANCE = 1e-3
MIN_NOISE = 1e-3
_MAX_NOISE = 1e5
_STRIDE = 1.08


@dataclass(frozen=True)
class Spent:
    """Upper bound on the ε that one client has spent, and the accountant that gave it."""

    epsilon: float
    accountant: str


class AccountantsDisagree(FedLoRAError):
    """Independent accountants gave values of ε for the same steps that cannot all be right."""

    def __init__(self, prv: float, pld: float, rdp: float) -> None:
        super().__init__(
            f"The accountants disagree on ε: PRV {prv:.6g}, PLD {pld:.6g}, RDP {rdp:.6g}; expected "
            "PLD ≤ PRV ≤ RDP. Check the installed versions of opacus and dp-accounting."
        )
        self.figures = prv, pld, rdp

    def __reduce__(self) -> tuple[type[AccountantsDisagree], tuple[float, float, float]]:
        """Rebuild the error from its three figures, so that it can be sent between processes."""
        return type(self), self.figures


def check_budget(
    epsilon: float, delta: float, batch_size: int, num_records: int, unit: str = RECORD
) -> None:
    """Refuse a budget that has no meaning for a client with this number of records, or users.

    Parameters
    ----------
    epsilon, delta : float
        The budget.
    batch_size : int
        Expected batch size b.
    num_records : int
        n, the number of units.
    unit : str (default: "record")
        What is counted, one of `fedlora_flwr.config.unit.UNITS`.

    Raises
    ------
    InvalidValue
        Unless `num_records` ≥ 1, `epsilon` > 0 (infinity means no privacy), 0 < `delta` <
        1 / `num_records`, and the expected `batch_size` is from 1 to `num_records`.
    """
    n = num_records
    if not n >= 1:
        raise InvalidValue(f"num-{unit}s", n, f"at least 1 {unit}")
    _check_epsilon(epsilon)
    if not 0 < delta < 1 / n:
        limit = f"below 1/n = {1 / n:.3g} for a client of n = {n} {unit}s"
        raise InvalidValue("delta", delta, f"a number above 0 and {limit}")
    if not 1 <= batch_size <= n:
        ways = "Lower batch-size, or merge small clients, or leave this client's records out"
        allowed = f"1 to {n}, for a client of n = {n} {unit}s. {ways}"
        raise InvalidValue("batch-size", batch_size, allowed)


def calibrate(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """Find the smallest noise multiplier whose ε stays within a budget.

    Parameters
    ----------
    epsilon : float
        The budget, above 0. Infinity gives 0: no noise.
    delta : float
        δ, between 0 and 1.
    sample_rate : float
        q: probability that a record joins a step, above 0 and at most 1.
    steps : int
        Number of private steps over the client's whole training, at least 1.

    Returns
    -------
    float
        σ, in units of the clip norm: about 0.1 % above the smallest sufficient value, never below
        it. With this σ, ``epsilon_spent([Segment(σ, q, steps)], δ).epsilon`` is at most `epsilon`.

    Raises
    ------
    InvalidValue
        If an argument is out of range, or no noise can be shown to meet the budget.
    AccountantsDisagree
        If PRV, PLD and RDP contradict each other at σ.

    References
    ----------
    PRV: arXiv 2106.02848. RDP: arXiv 1908.10530. PLD: the library dp-accounting.

    Examples
    --------
    >>> round(calibrate(epsilon=8.0, delta=1e-3, sample_rate=0.1, steps=100), 3)
    0.779
    """
    _check_epsilon(epsilon)
    _check_delta(delta)
    Segment(1.0, sample_rate, steps)
    if steps < 1:
        raise InvalidValue("steps", steps, "at least 1")
    if math.isinf(epsilon):
        return 0.0
    return _calibrate(float(epsilon), float(delta), float(sample_rate), int(steps))


def epsilon_spent(history: Sequence[Segment], delta: float, accountant: str = "prv") -> Spent:
    """Bound the ε that a history of private steps has spent.

    It is fast enough for a call per round, because a growing history mostly keeps its grid.

    Parameters
    ----------
    history : Sequence[Segment]
        Steps in the order in which they ran. Adjacent segments with the same σ and q are joined.
    delta : float
        δ, between 0 and 1.
    accountant : str (default: "prv")
        One of `fedlora_flwr.privacy.accountants.ACCOUNTANTS`.

    Returns
    -------
    Spent
        ε and the accountant that gave it. ε is 0 without steps, and infinite if any step had σ = 0.
        Where PRV would take too much memory, ε comes from RDP, which is an upper bound as well.

    Raises
    ------
    InvalidValue
        If `delta` is out of range, or `accountant` is unknown.

    Examples
    --------
    >>> history = [Segment(noise_multiplier=1.0, sample_rate=0.1, steps=100)]
    >>> found = epsilon_spent(history, delta=1e-3)
    >>> round(found.epsilon, 2), found.accountant
    (4.79, 'prv')
    """
    _check_delta(delta)
    if accountant not in ACCOUNTANTS:
        raise unknown("accountant", accountant, ACCOUNTANTS)
    segments = merge(history)
    if not segments:
        return Spent(0.0, accountant)
    if any(s.noise_multiplier == 0 for s in segments):
        return Spent(math.inf, accountant)
    return _spent(segments, float(delta), accountant)


def _check_epsilon(epsilon: float) -> None:
    if not epsilon > 0:
        raise InvalidValue("epsilon", epsilon, "a number above 0, or inf for no privacy")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise InvalidValue("delta", delta, "a number above 0 and below 1")


@functools.lru_cache(maxsize=1024)
def _calibrate(epsilon: float, delta: float, rate: float, steps: int) -> float:
    inputs = ["calibrate", epsilon, delta, rate, steps]
    return _stored(inputs, lambda: _search(epsilon, delta, rate, steps))[0]


@functools.lru_cache(maxsize=1024)
def _spent(segments: tuple[Segment, ...], delta: float, accountant: str) -> Spent:
    steps = [[s.noise_multiplier, s.sample_rate, s.steps] for s in segments]
    inputs = ["spent", steps, delta, accountant]
    return Spent(*_stored(inputs, lambda: _account(segments, delta, accountant)))


def _account(segments: Sequence[Segment], delta: float, accountant: str) -> tuple[float, str]:
    """Compute ε, and name the accountant that gave it."""
    epsilon = ACCOUNTANTS[accountant](segments, delta)
    if epsilon is None:
        return rdp_epsilon(segments, delta), "rdp"
    return epsilon, accountant


def _search(budget: float, delta: float, rate: float, steps: int) -> tuple[float, str]:
    """Solve for σ by secants of log ε in log σ, inside a bracket; return σ and the accountant."""
    unsafe, safe, accountant = MIN_NOISE, math.inf, ""
    sigma, slope = _rdp_noise(budget, delta, rate, steps)
    tried: list[tuple[float, float]] = []
    while sigma <= _MAX_NOISE:
        epsilon, name = _account([Segment(sigma, rate, steps)], delta, "prv")
        # Only a σ whose own ε was computed and found within the budget is ever returned.
        if epsilon <= budget:
            safe, spent, accountant = sigma, epsilon, name
        else:
            unsafe = sigma
        if safe <= unsafe * (1 + _TOLERANCE / 2) or budget * (1 - _TOLERANCE) <= epsilon <= budget:
            break
        tried.append((math.log(sigma), math.log(max(epsilon, 1e-12))))
        sigma = _next_noise(tried, slope, math.log(budget * (1 - _TOLERANCE / 2)))
        # ε jumps where the accountant changes its grid. Secants may get stuck there, so the bracket
        # is then halved, or doubled while no safe σ is known.
        if not unsafe < sigma < safe or len(tried) > 8:
            sigma = math.sqrt(unsafe * safe) if safe < math.inf else 2 * unsafe
    if not accountant:
        raise InvalidValue("epsilon", budget, f"a budget that a σ up to {_MAX_NOISE:g} can meet")
    if accountant == "prv":
        _cross_check(Segment(safe, rate, steps), delta, spent)
    return safe, accountant


def _rdp_noise(budget: float, delta: float, rate: float, steps: int) -> tuple[float, float]:
    """Return a σ that RDP finds safe, where PRV is fast, and the slope of log ε in log σ there."""

    def bound(sigma: float) -> float:
        return rdp_epsilon([Segment(sigma, rate, steps)], delta, coarse=True)

    low, high = MIN_NOISE, _MAX_NOISE
    while high > 1.02 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if bound(middle) <= budget else (middle, high)
    found, less = bound(high), bound(high / _STRIDE)
    if not 0 < found < less < math.inf:
        return high, -2.0
    return high, math.log(found / less) / math.log(_STRIDE)


def _next_noise(tried: Sequence[tuple[float, float]], slope: float, target: float) -> float:
    """Return the σ at which a line through the last two (log σ, log ε) meets the target."""
    x, y = tried[-1]
    if len(tried) > 1 and tried[-2][0] != x:
        slope = (y - tried[-2][1]) / (x - tried[-2][0])
    return math.exp(x + min(max((target - y) / min(slope, -0.5), -1.0), 1.0))


def _cross_check(segment: Segment, delta: float, prv: float) -> None:
    """Compare the ε of PRV with the ε of PLD and RDP.

    Raises
    ------
    AccountantsDisagree
        PLD is clearly above PRV, or RDP is clearly below it.
    """
    # A mesh of this width adds an error to PLD that is small against the tolerance below.
    pld = pld_epsilon([segment], delta, interval=max(1e-4, prv / 2000))
    rdp = rdp_epsilon([segment], delta)
    # PRV adds this much for its own error, which is not small where ε is small.
    slack = 0.01 if prv >= 1 else 0.001
    above = pld is not None and pld > 1.02 * prv + slack
    if above or rdp < 0.99 * prv - slack:
        raise AccountantsDisagree(prv, math.nan if pld is None else pld, rdp)


def _stored(inputs: list[object], compute: Callable[[], tuple[float, str]]) -> tuple[float, str]:
    """Return a result from its file, or compute and store it. Problems with files raise nothing."""
    trouble = (OSError, RuntimeError, ValueError)  # No home, no file, no permission, not text.
    key = json.dumps([_stamp(), inputs])
    found = None
    with contextlib.suppress(*trouble):
        found = _load(_path(key).read_bytes(), key)
    if found is None:
        found = compute()
        with contextlib.suppress(*trouble):
            _save(_path(key), key, found)
    return found


def _load(content: bytes, key: str) -> tuple[float, str] | None:
    """Return a file's result if the file is undamaged and has exactly this key."""
    match json.loads(content):
        case {"key": str(asked), "value": float(value), "accountant": str(name), "check": check}:
            whole = check == _digest(asked, value, name) and 0 <= value < math.inf
            return (value, name) if whole and asked == key else None
    return None


def _save(path: Path, key: str, found: tuple[float, str]) -> None:
    value, name = found
    check = _digest(key, value, name)
    content = json.dumps({"key": key, "value": value, "accountant": name, "check": check})
    private_folder(path.parent)
    replace_file(path, content.encode())


def _path(key: str) -> Path:
    return cache_folder() / "accounting" / f"{_digest(key)}.json"


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@functools.lru_cache(maxsize=1)
def _stamp() -> list[str]:
    """Identify the code that computes. After any change to it, older files are not used."""
    files = (__file__, accountants.__file__, loss_grid.__file__)
    sources = [Path(name).read_bytes() for name in files]
    libraries = [version(name) for name in ("opacus", "dp-accounting", "numpy", "scipy")]
    return [_digest(*sources), *libraries]
