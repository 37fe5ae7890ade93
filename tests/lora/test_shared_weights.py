"""Frozen weights as pages of one file: same values, one copy, and each process's writes its own."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedlora_flwr.lora.adapters import AdaptedModel, attach
from fedlora_flwr.lora.digests import in_bytes
from fedlora_flwr.lora.shared_weights import share
from tests.models import FAMILIES, SWIN, VIT, Family, active

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fedlora" / "frozen"


def mapped_from(path: Path) -> list[tuple[str, str]]:
    """Return permissions and offset of each part of a file that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [(line.split()[1], line.split()[2]) for line in lines if line.endswith(str(path))]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_model_on_shared_weights_is_the_same_model(family: Family, cache: Path) -> None:
    adapted, batch = family.adapted(), family.records(3).batch(torch.arange(3))
    before = {name: tensor.clone() for name, tensor in adapted.frozen()}
    parameters = {name: id(p) for name, p in adapted.model.named_parameters()}
    losses, fingerprint = family.losses(adapted.model, batch), adapted.fingerprint

    path = share(adapted)

    assert path == cache / f"{fingerprint}.pt"
    assert mapped_from(path)
    assert {name: id(p) for name, p in adapted.model.named_parameters()} == parameters
    for name, tensor in adapted.frozen():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == before[name].dtype
    assert torch.equal(family.losses(adapted.model, batch), losses)
    del adapted.__dict__["_frozen_digests"]
    assert adapted.fingerprint == fingerprint
    # What trains stays out of the file.
    content = torch.load(path, weights_only=True)
    assert not any(name.startswith(tuple(active(adapted, "*"))) for name in content)
    assert len(content) == len(before)


@pytest.mark.parametrize(
    "kept",
    [torch.tensor(3), torch.tensor(0.5), torch.tensor([float("nan"), 1.0]),
     torch.zeros(3).to(torch.float8_e4m3fn), torch.zeros(0, 2)],
    ids=["counter", "scale", "nan", "float8", "empty"],
)  # fmt: skip
def test_arrays_of_any_shape_and_type_are_shared(kept: torch.Tensor) -> None:
    def adapted() -> AdaptedModel:
        model = VIT.model().float()
        model.register_buffer("kept", kept.clone())
        return attach(model, VIT.spec(), seed=0)

    first, second = adapted(), adapted()
    path = share(first)
    assert path is not None
    written = path.stat().st_mtime_ns
    assert share(second) == path
    assert path.stat().st_mtime_ns == written
    for model in (first, second):
        shared = dict(model.frozen())["base_model.model.kept"]
        assert torch.equal(in_bytes(shared), in_bytes(kept))
        assert shared.shape == kept.shape


def test_what_a_process_writes_is_its_own() -> None:
    first, second = VIT.adapted(), VIT.adapted()
    path = share(first)
    assert share(second) == path
    assert path is not None
    content = path.read_bytes()
    (name, mine), (_, others) = next(first.frozen()), next(second.frozen())
    before = others.clone()

    with torch.no_grad():
        mine.add_(1.0)

    assert torch.equal(mine, before + 1.0), name
    assert torch.equal(others, before)
    assert path.read_bytes() == content


@pytest.mark.parametrize("damage", ["cut", "changed", "other"])
def test_a_damaged_file_is_written_again(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    adapted = VIT.adapted()
    path = share(adapted)
    assert path is not None
    whole = path.read_bytes()
    before = {name: tensor.clone() for name, tensor in VIT.adapted().frozen()}
    if damage == "cut":
        path.with_suffix(".new").write_bytes(whole[: len(whole) // 2])
    elif damage == "changed":
        torch.save({n: t + 1 if t.is_floating_point() else t for n, t in before.items()},
                   path.with_suffix(".new"))  # fmt: skip
    else:
        torch.save({"x": torch.zeros(3)}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)

    again = VIT.adapted()
    assert share(again) == path

    assert all(torch.equal(tensor, before[name]) for name, tensor in again.frozen())
    found = torch.load(path, weights_only=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())


def test_without_a_place_for_the_file_weights_stay_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    adapted = SWIN.adapted()
    before = {name: tensor.data_ptr() for name, tensor in adapted.frozen()}
    with caplog.at_level(logging.WARNING):
        assert share(adapted) is None
    assert {name: tensor.data_ptr() for name, tensor in adapted.frozen()} == before
    assert "not shared" in caplog.text


WORKER = """
import re
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from fedlora_flwr.lora.adapters import AdaptedModel
from fedlora_flwr.lora.adapters import AdaptedModel, attach
from fedlora_flwr.lora.digests import in_bytes
from fedlora_flwr.lora.shared_weights import share

def own_memory():
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"Anonymous: +([0-9]+)", text)[1]) / 1e3

before = own_memory()
net = torch.nn.Sequential(*(torch.nn.Linear(1000, 1000) for _ in range(12)))
adapted = AdaptedModel(get_peft_model(net, LoraConfig(target_modules="0")))
adapted.fingerprint
made = own_memory()
share(adapted)
torch.stack([p.sum() for p in net.parameters() if p.ndim == 2]).sum()
print(made - before, own_memory() - before)
"""


def test_weights_leave_a_process_own_memory() -> None:
    run = subprocess.run(
        [sys.executable, "-c", WORKER], capture_output=True, text=True, cwd=ROOT, check=True
    )
    made, shared = map(float, run.stdout.split())
    # Twelve layers of 4 MB.
    assert made == pytest.approx(48, abs=4)
    assert shared < 8
