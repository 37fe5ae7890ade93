"""The paired game on real clients: it finds much of what is claimed, and what is broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from fedlora_flwr.audit.paired import play, record_of, short
from fedlora_flwr.audit.record import HOLDS, VIOLATED, AuditRecord
from fedlora_flwr.cli import app
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.recipes import load_recipe
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.privacy import clipping, noise
from tests.cli.documented import fields

# With so many trials chance turns the verdict of honest clients once in some thousand times.
RUNS, RECORDS, CONFIDENCE = 200, 4, 0.995


def attacked(runs: int = RUNS, **changes: Any) -> AuditRecord:
    own = {key.replace("_", "-"): value for key, value in changes.items()}
    recipe = RunConfig.of(load_recipe("digits").items(), {"epsilon": 4.0, "device": "cpu"}, own)
    config = short(recipe, RECORDS, keep=own)
    return record_of(config, play(config, RECORDS, runs), CONFIDENCE, 0.0)


def test_an_honest_client_holds_its_claim_and_the_attack_is_no_weak_one() -> None:
    found = attacked(strategy="rolora", num_rounds=1)
    assert found.claim == pytest.approx(4.0, abs=0.05)
    assert found.absent + found.present == 4 * RUNS
    assert found.verdict == HOLDS, found


def without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = noise.SeededNoise.normal_like
    monkeypatch.setattr(noise.SeededNoise, "normal_like", lambda *a: 1e-3 * drawn(*a))


def a_tenth_of_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = noise.SeededNoise.normal_like
    monkeypatch.setattr(noise.SeededNoise, "normal_like", lambda *a: drawn(*a) / 10)


def without_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        clipping, "clip_factors", lambda norms, _, kind: torch.ones_like(norms, dtype=kind)
    )


@pytest.mark.parametrize("fault", [without_noise, a_tenth_of_the_noise, without_clipping])
def test_what_is_broken_is_found(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    found = attacked(runs=20, strategy="ffa-lora", num_rounds=1)
    assert found.verdict == VIOLATED, found


def test_a_secure_sum_is_refused() -> None:
    recipe = load_recipe("digits-secure-sum")
    with pytest.raises(InvalidValue, match="trust-model"):
        play(short(recipe, RECORDS, keep={"weighting"}), RECORDS, 1)


def command(*words: str) -> Result:
    return CliRunner().invoke(app, ["audit", "digits", "-c", "device=cpu", *words])


def test_the_command_writes_its_record_and_says_what_it_means(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    words = ("--runs", "12", "--records", "4", "-c", "num-rounds=1", "--output", str(file))
    said = command(*words)
    assert said.exit_code == 0, said.output
    record = json.loads(file.read_text())
    assert record["runs"] == 12
    assert record["settings"]["num-rounds"] == 1
    assert {bound["statistic"] for bound in record["bounds"]} == {
        "Clopper-Pearson", "Gaussian fit",
    }  # fmt: skip
    assert set(record) == fields("audit")
    assert record["verdict"] in said.output
    assert f"ε = {record['claim']:.3f}" in said.output
