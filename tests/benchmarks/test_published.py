from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.figures import Figure
from benchmarks.published import Setting, _config, _make, _Script, measure
from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.privacy.calibration import calibrated_mechanism

SMALL = Setting(
    clients=2, records=60, batch=8, steps=2, rounds=2, tested=20, max_length=40, hidden=24,
    layers=2, heads=2,
)  # fmt: skip


def test_rounds_of_both_ways_are_timed() -> None:
    found: list[Figure] = []

    measure(SMALL, found.append)

    assert [figure.bar for figure in found] == [1 / 10, 1 / 3] * 2
    assert ["bf16" in figure.what for figure in found] == [False, False, True, True]
    assert all(figure.ours and figure.reference for figure in found)
    # One script is timed once for both precisions.
    assert found[0].reference == found[2].reference
    assert found[1].reference == found[3].reference


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    _make(folder, SMALL)
    return folder


@pytest.mark.parametrize("cut", [False, True])
def test_both_ways_train_the_same_arrays_at_the_same_noise(
    made: Path, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(made / "cache"))
    config = _config(made, SMALL)
    trainer = LocalTrainer.build(config)
    records = trainer.task.client_records(0, SMALL.clients)
    mechanism = calibrated_mechanism(config, len(records))
    script = _Script(made, SMALL, mechanism.noise_multiplier, config.clip_norm, cut)

    uploaded = script.client(SMALL.steps)

    assert sorted(x.shape for x in uploaded.values()) == sorted(
        x.shape for x in trainer.start.values()
    )
    # As many records to a client, so that the sampling rate is the same.
    assert len(records) == SMALL.records
    zero = [name for name, x in uploaded.items() if "lora_B" in name and not x.any()]
    assert uploaded
    assert not zero


def test_padding_changes_no_prediction_of_the_script(made: Path) -> None:
    scripts = [_Script(made, SMALL, 1.0, 1.0, cut) for cut in (False, True)]
    batches = [next(iter(script._loader("validation", SMALL.tested))) for script in scripts]
    padded, cut = (batch["input_ids"] for batch in batches)
    assert padded.shape == (SMALL.batch, SMALL.max_length)
    assert cut.shape[1] < SMALL.max_length
    assert torch.equal(padded[:, : cut.shape[1]], cut)
    assert not padded[:, cut.shape[1] :].any()
    torch.manual_seed(0)
    first = scripts[0].evaluate()
    torch.manual_seed(0)
    assert scripts[1].evaluate() == first


def test_texts_are_as_long_as_those_of_sst2(made: Path) -> None:
    _make(made, Setting(clients=6, records=2000, hidden=24, layers=1, heads=2))
    frame = pd.read_parquet(made / "data" / "train.parquet")
    words = frame["sentence"].str.split().map(len)
    assert words.median() == 7
    assert np.mean(words < 36) == pytest.approx(0.99, abs=0.005)
