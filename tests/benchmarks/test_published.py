from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.figures import Figure
from benchmarks.published import Setting, _config, _make, _Script, measure
from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.privacy.calibration import calibrated_mechanism

SMALL = Setting(
    clients=2, records=60, batch=8, steps=2, rounds=2, max_length=40, hidden=24, layers=2, heads=2
)


def test_rounds_of_both_ways_are_timed() -> None:
    found: list[Figure] = []

    measure(SMALL, found.append)

    (figure,) = found
    assert figure.bar == 0.2
    assert figure.ours is not None
    assert figure.reference is not None
    assert min(figure.ours, figure.reference) > 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    _make(folder, SMALL)
    return folder


def test_both_ways_train_the_same_arrays_at_the_same_noise(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(made / "cache"))
    config = _config(made, SMALL)
    trainer = LocalTrainer.build(config)
    records = trainer.task.client_records(0, SMALL.clients)
    mechanism = calibrated_mechanism(config, len(records))
    script = _Script(made, SMALL, mechanism.noise_multiplier, config.clip_norm)

    uploaded = script.client(SMALL.steps)

    assert sorted(x.shape for x in uploaded.values()) == sorted(
        x.shape for x in trainer.start.values()
    )
    # As many records to a client, so that the sampling rate is the same.
    assert len(script._texts) == len(records) == SMALL.records
    zero = [name for name, x in uploaded.items() if "lora_B" in name and not x.any()]
    assert uploaded
    assert not zero


def test_texts_are_as_long_as_those_of_sst2(made: Path) -> None:
    _make(made, Setting(clients=6, records=2000, hidden=24, layers=1, heads=2))
    frame = pd.read_parquet(made / "data" / "train.parquet")
    words = frame["sentence"].str.split().map(len)
    assert words.median() == 7
    assert np.mean(words < 36) == pytest.approx(0.99, abs=0.005)
