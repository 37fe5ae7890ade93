from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fedlora_flwr.backbones.pretrain_digits import (
    Recipe,
    backbone_path,
    build_vit,
    load_backbone,
)

QUICK = Recipe(images=200, steps=3, batch=16)


def _screen(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=60)


def kept(console: Console, recipe: Recipe) -> Path:
    """Pretrain unless an intact copy is in the cache, and return its file."""
    load_backbone(console, recipe)
    return backbone_path(recipe)


def _shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_first_call_trains_and_keeps_the_weights_and_their_checksum(empty_cache: Path) -> None:
    path = kept(_screen(terminal=False), QUICK)

    assert empty_cache in path.parents
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert Path(f"{path}.sha256").read_text() == f"{digest}  {path.name}\n"
    initial, trained = build_vit(QUICK.seed).state_dict(), load_file(path)
    assert trained.keys() == initial.keys()
    assert not torch.equal(trained["head.weight"], initial["head.weight"])


@pytest.mark.usefixtures("empty_cache")
def test_the_second_call_only_reads() -> None:
    path = kept(_screen(terminal=False), QUICK)
    written = path.stat().st_mtime_ns
    console = _screen(terminal=False)

    assert kept(console, QUICK).stat().st_mtime_ns == written
    assert _shown(console) == ""


@pytest.mark.usefixtures("empty_cache")
def test_a_damaged_backbone_is_trained_again_to_the_same_weights() -> None:
    path = kept(_screen(terminal=False), QUICK)
    intact = path.read_bytes()
    path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))

    load_backbone(_screen(terminal=False), QUICK)

    assert path.read_bytes() == intact


@pytest.mark.usefixtures("empty_cache")
def test_without_a_terminal_one_line_says_what_happens_and_where() -> None:
    console = _screen(terminal=False)
    path = kept(console, QUICK)

    assert _shown(console).count("\n") == 1
    assert str(path) in _shown(console)


@pytest.mark.usefixtures("empty_cache")
def test_a_terminal_gets_a_bar() -> None:
    console = _screen(terminal=True)
    kept(console, QUICK)

    assert "100%" in _shown(console)


@pytest.mark.usefixtures("empty_cache")
def test_each_recipe_has_its_own_file() -> None:
    assert backbone_path(QUICK) != backbone_path(replace(QUICK, seed=1))


@pytest.mark.usefixtures("empty_cache")
def test_pretraining_leaves_the_process_as_it_was() -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    kept(_screen(terminal=False), QUICK)

    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_the_model_is_as_small_as_it_says() -> None:
    assert sum(weight.numel() for weight in build_vit().parameters()) == 77_434
