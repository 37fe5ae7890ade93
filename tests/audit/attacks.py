"""Short attacks on the digits, for the tests of the audit."""

from __future__ import annotations

from typing import Any

import pytest

from fedlora_flwr.audit import one_run, trials
from fedlora_flwr.audit.canaries import GRADIENT
from fedlora_flwr.audit.game import short
from fedlora_flwr.audit.record import PAIRED, AuditRecord
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.recipes import load_recipe
from fedlora_flwr.privacy import noise

RECORDS = 4
# At this confidence an honest client gets the verdict of a broken one once in a million times.
CONFIDENCE = 1 - 1e-6


def settings(recipe: str = "digits", records: int = RECORDS, **changes: Any) -> RunConfig:
    own = {key.replace("_", "-"): value for key, value in changes.items()}
    return short(load_recipe(recipe), records, {"epsilon": 4.0, "device": "cpu", **own})


def attacked(
    runs: int,
    recipe: str = "digits",
    mode: str = PAIRED,
    kind: str = GRADIENT,
    confidence: float = CONFIDENCE,
    **changes: Any,
) -> AuditRecord:
    config = settings(recipe, **changes)
    setting = trials.trials_setting(config, RECORDS, kind, mode)
    return trials.record_of(setting, mode, trials.play(setting, mode, runs), confidence)


def attacked_once(canaries: int, confidence: float = CONFIDENCE, **changes: Any) -> AuditRecord:
    config = settings(records=canaries, **changes)
    return one_run.attack_once(one_run.one_run_setting(config, canaries, GRADIENT), confidence)


def without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = noise.SeededNoise.normal_like
    monkeypatch.setattr(noise.SeededNoise, "normal_like", lambda *a: 1e-3 * drawn(*a))
