"""Which precision is faster on this machine: the choice, its measurement, and how it is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fedlora_flwr.errors import ModelFailed
from fedlora_flwr.lora.auto_precision import THRESHOLD, Product, Speeds, measure, speeds_of

SMALL = Product("cpu", 1, 16, 8)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Measured:
    """Gives speeds instead of measuring them, and counts how often it is asked."""

    def __init__(self, *speeds: Speeds) -> None:
        self.speeds, self.asked = list(speeds), 0

    def __call__(self, _: Product) -> Speeds:
        self.asked += 1
        return self.speeds[self.asked - 1]


@pytest.mark.parametrize(
    ("fp32", "bf16", "chosen"),
    [
        (5.0, 1.0, "bf16"),
        (THRESHOLD, 1.0, "bf16"),
        (THRESHOLD - 0.01, 1.0, "fp32"),
        (1.0, 1.0, "fp32"),
        (1.0, 3.0, "fp32"),
    ],
)
def test_bf16_is_chosen_where_it_is_clearly_faster(fp32: float, bf16: float, chosen: str) -> None:
    speeds = Speeds(fp32, bf16)
    assert speeds.precision == chosen
    assert str(speeds).startswith(f"{chosen}, chosen on this machine: bf16 is {fp32 / bf16:.2g} ")


def test_a_machine_is_measured_once() -> None:
    measured = Measured(Speeds(3.0, 1.0), Speeds(1.0, 3.0))

    first, again = speeds_of(SMALL, measured), speeds_of(SMALL, measured)

    assert first == again == Speeds(3.0, 1.0)
    assert measured.asked == 1
    assert json.loads(SMALL.file.read_text()) == {"fp32": 3.0, "bf16": 1.0}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff", b"[]", b'{"fp32": 1.0}', b'{"fp32": 1.0, "bf16": 0.0}',
        b'{"fp32": 1.0, "bf16": NaN}', b'{"fp32": 1.0, "bf16": "fast"}',
    ],
)  # fmt: skip
def test_a_broken_file_is_measured_again(content: bytes) -> None:
    SMALL.file.parent.mkdir(parents=True)
    SMALL.file.write_bytes(content)
    measured = Measured(Speeds(3.0, 1.0))

    assert speeds_of(SMALL, measured) == speeds_of(SMALL, measured) == Speeds(3.0, 1.0)
    assert measured.asked == 1


def test_a_cache_that_cannot_be_written_costs_a_measurement_and_no_error(cache: Path) -> None:
    cache.write_text("a file is in the way")
    measured = Measured(Speeds(3.0, 1.0), Speeds(3.0, 1.0))
    assert speeds_of(SMALL, measured) == Speeds(3.0, 1.0)


def test_each_product_version_and_processor_has_its_own_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = replace(SMALL, threads=4), replace(SMALL, inputs=4), replace(SMALL, outputs=4)
    files = {product.file for product in (SMALL, *others)}
    monkeypatch.setattr(torch, "__version__", "0.0.1")
    files.add(SMALL.file)
    monkeypatch.setattr("fedlora_flwr.lora.auto_precision.processor", lambda: "another")
    files.add(SMALL.file)
    assert len(files) == 6


def test_the_measurement_multiplies_in_both_types_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    product = torch.nn.functional.linear

    def watched(*args: torch.Tensor) -> torch.Tensor:
        found = product(*args)
        seen.append(found.dtype)
        return found

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    threads, stream = torch.get_num_threads(), torch.get_rng_state()

    speeds = measure(replace(SMALL, threads=threads + 1))

    assert speeds.fp32 > 0
    assert speeds.bf16 > 0
    assert seen[:4] == [torch.float32, torch.bfloat16] * 2  # In turns.
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), stream)


def test_a_device_that_cannot_be_measured_says_what_to_set() -> None:
    with pytest.raises(ModelFailed, match="Set precision to fp32"):
        measure(Product("meta:x", 1, 16, 8))


def test_the_size_is_that_of_most_frozen_weights() -> None:
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(40, 40), nn.Linear(99, 99)
        )
    model.requires_grad_(False)
    model[3].requires_grad_(True)

    assert Product.of(model, torch.device("cpu"), 2) == Product("cpu", 2, 30, 30)


def test_a_large_layer_is_measured_in_part_and_a_model_without_one_by_a_usual_size() -> None:
    with torch.device("meta"):
        large, none = nn.Linear(5000, 20).requires_grad_(False), nn.Conv2d(3, 3, 1)
    assert Product.of(large, torch.device("cpu"), 1) == Product("cpu", 1, 2048, 20)
    assert Product.of(none, torch.device("cpu"), 1) == Product("cpu", 1, 768, 768)
