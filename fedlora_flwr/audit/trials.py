"""Many short runs with one canary each, which a coin lets in or not: `PAIRED` and `BLACK_BOX`.

In the paired game the attacker is the server and sees each round. A black box is the final model
alone: the attacker compares the canary's loss under it with a threshold.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedlora_flwr.audit.attacker import View
from fedlora_flwr.audit.bounds import Scores, bounds_of
from fedlora_flwr.audit.game import Game, Setting
from fedlora_flwr.audit.record import BLACK_BOX, AuditRecord, Counts, curve_of
from fedlora_flwr.config import RunConfig
from fedlora_flwr.processes.workers import Execute, one_by_one

BATCH = 10
"""Runs of one job."""


@dataclass(frozen=True)
class Trials:
    """The scores of all trials.

    Parameters
    ----------
    absent, present : ndarray
        The attacker's scores without and with the canary, shape (trials,).
    claim : float
        The largest ε that a client's ledger claimed.
    runs : int
        Number of runs.
    """

    absent: Scores
    present: Scores
    claim: float
    runs: int


def trials_setting(config: RunConfig, records: int, kind: str, mode: str) -> Setting:
    """Return who has a canary: each client, or one of them where they share one mechanism.

    Parameters
    ----------
    config : RunConfig
        The settings of each run.
    records : int
        Records of each client.
    kind : str
        Kind of the canaries.
    mode : str
        `PAIRED` or `BLACK_BOX`.
    """
    alone = config.secure_sum or mode == BLACK_BOX
    counts = [1] + [int(not alone)] * (config.num_clients - 1)
    return Setting(config, records, kind, tuple(counts))


def play(
    setting: Setting,
    mode: str,
    runs: int,
    execute: Execute = one_by_one,
    on_runs: Callable[[int], object] = int,
) -> Trials:
    """Play the game so often.

    Parameters
    ----------
    setting : Setting
        What is attacked (see `trials_setting`).
    mode : str
        `PAIRED` or `BLACK_BOX`.
    runs : int
        Number of runs.
    execute : Execute
        Where the runs take place.
    on_runs : callable, optional
        Called with the number of runs so far.

    Raises
    ------
    InvalidValue
        As `Game`.
    """
    sizes = [min(BATCH, runs - first) for first in range(0, runs, BATCH)]
    found: list[Trials] = []
    on_runs(0)
    for part in execute(_part, [(setting, mode, size) for size in sizes]):
        found.append(part)
        on_runs(sum(one.runs for one in found))
    return Trials(
        np.concatenate([one.absent for one in found]),
        np.concatenate([one.present for one in found]),
        max(one.claim for one in found),
        runs,
    )


def record_of(setting: Setting, mode: str, trials: Trials, confidence: float) -> AuditRecord:
    """Return the record of trials: both bounds, and how they were found.

    Parameters
    ----------
    setting : Setting
        What was attacked.
    mode : str
        `PAIRED` or `BLACK_BOX`.
    trials : Trials
        The scores.
    confidence : float
        Of all bounds together (Bonferroni).

    Raises
    ------
    InvalidValue
        There are too few trials (see `clopper_pearson`).
    """
    config, scores = setting.config, (trials.absent, trials.present)
    return AuditRecord(
        settings=config.items(),
        mode=mode,
        canary=setting.kind,
        counts=Counts(runs=trials.runs, absent=len(trials.absent), present=len(trials.present)),
        curve=curve_of(*scores),
        claim=trials.claim,
        delta=config.delta,
        confidence=confidence,
        bounds=bounds_of(*scores, config.delta, confidence),
    )


_game = lru_cache(maxsize=1)(Game)


def _part(job: tuple[Setting, str, int]) -> Trials:
    setting, mode, runs = job
    game = _game(setting)
    scores: dict[bool, list[float]] = {False: [], True: []}
    claim = 0.0
    coins_of = [[tosses(runs) for _ in range(count)] for count in setting.canaries]
    for run in range(runs):
        coins = [[toss[run] for toss in client] for client in coins_of]
        found, claimed = _black_box(game, coins) if mode == BLACK_BOX else _paired(game, coins)
        claim = max(claim, claimed)
        for coin, score in zip((c for client in coins for c in client), found, strict=True):
            scores[coin].append(score)
    return Trials(np.array(scores[False]), np.array(scores[True]), claim, runs)


def tosses(runs: int) -> list[bool]:
    """Return whether a canary takes part in each run: in half of them, in random order."""
    found = [True, False] * (runs // 2) + [bool(secrets.randbits(1))] * (runs % 2)
    secrets.SystemRandom().shuffle(found)
    return found


def _paired(game: Game, coins: list[list[bool]]) -> tuple[list[float], float]:
    """Return each attacker's score after all rounds, and the claim."""
    scores = [0.0] * len(game.attackers)

    def watch(unit: int, view: View) -> None:
        scores[unit] += game.attackers[unit].score(view)

    ending = game.run(coins, watch)
    return scores, ending.claim


def _black_box(game: Game, coins: list[list[bool]]) -> tuple[list[float], float]:
    """Return how well the final model knows the only canary, and the claim."""
    ending = game.run(coins)
    return [-game.attackers[0].loss(ending.arrays)], ending.claim
