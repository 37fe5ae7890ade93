"""One run with hundreds of canaries, each of which a coin of its own lets in (arXiv 2305.08846)."""

from __future__ import annotations

import math
import secrets

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.audit.attacker import Evidence, View
from fedlora_flwr.audit.bounds import Scores, one_run, one_run_gaussian
from fedlora_flwr.audit.game import Game, Setting
from fedlora_flwr.audit.record import ONE_RUN, AuditRecord, Counts, curve_of
from fedlora_flwr.config import RunConfig

BOUNDS = (one_run, one_run_gaussian)
_HALF, _FIFTH, _THOUSAND = 0.5, 0.2, 1000


def one_run_setting(config: RunConfig, canaries: int, kind: str) -> Setting:
    """Return a setting in which each record of each client is a canary.

    Parameters
    ----------
    config : RunConfig
        The settings of the run.
    canaries : int
        Canaries of each client.
    kind : str
        Kind of the canaries.
    """
    return Setting(config, canaries, kind, (canaries,) * config.num_clients)


def attack_once(setting: Setting, confidence: float) -> AuditRecord:
    """Run once, guess for each canary whether it took part, and return the record.

    Parameters
    ----------
    setting : Setting
        What is attacked.
    confidence : float
        Of both bounds together (Bonferroni).

    Raises
    ------
    InvalidValue
        As `Game`.
    """
    game = Game(setting)
    coins = [[bool(secrets.randbits(1)) for _ in range(count)] for count in setting.canaries]
    found: dict[int, Evidence] = {}

    def watch(unit: int, view: View) -> None:
        new = game.attackers[unit].evidence(view)
        found[unit] = found[unit] + new if unit in found else new

    ending = game.run(coins, watch)
    scores = np.concatenate([found[unit].scores for unit in sorted(found)])
    truth = np.array([coin for client in coins for coin in client])
    each, total = 1 - (1 - confidence) / len(BOUNDS), len(truth)
    config = setting.config
    guesses = guessed(total)
    right = [correct(scores, truth, number) for number in guesses]
    return AuditRecord(
        settings=config.items(),
        mode=ONE_RUN,
        canary=setting.kind,
        counts=Counts(1, int((~truth).sum()), int(truth.sum()), guesses=guesses, correct=right),
        curve=curve_of(scores[~truth], scores[truth]),
        claim=ending.claim,
        delta=config.delta,
        confidence=confidence,
        bounds=[
            bound(hits, number, total, config.delta, each)
            for bound, hits, number in zip(BOUNDS, right, guesses, strict=True)
        ],
    )


def guessed(canaries: int) -> list[int]:
    """Return how many canaries are guessed, for the bound that assumes nothing and for the other.

    Those are guessed whose scores are highest and lowest. By simulation of a Gaussian mechanism of
    ε = 4, these numbers give nearly the largest bounds: half of the canaries for the first bound,
    and for the second a fifth of a thousand, and of more canaries a share that falls with the root
    of their number. The numbers depend on nothing that the run has shown, as both theorems ask.

    Parameters
    ----------
    canaries : int
        Number of canaries.
    """
    shares = _HALF, _FIFTH * min(1.0, math.sqrt(_THOUSAND / canaries))
    return [2 * math.ceil(share * canaries / 2) for share in shares]


def correct(scores: Scores, truth: NDArray[np.bool_], guesses: int) -> int:
    """Return how many guesses are right: half of them say "in", for the highest scores.

    The number of guesses is fixed in advance, as the theorem asks.

    Parameters
    ----------
    scores : ndarray
        Of each canary, shape (k,).
    truth : ndarray
        Whether it took part, bool, shape (k,).
    guesses : int
        At most k. The other half says "out", for the lowest scores.
    """
    order, half = np.argsort(scores), guesses // 2
    return int(truth[order[len(order) - half :]].sum() + (~truth[order[:half]]).sum())
