from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import pytest
import torch
from torch import Tensor

from fedlora_flwr.backbones.printed_digits import FONTS, render


@pytest.fixture(scope="module")
def printed() -> tuple[Tensor, Tensor]:
    return render(2000, seed=3)


def test_every_font_ships_with_matplotlib() -> None:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"

    assert [name for name in FONTS if not (folder / f"{name}.ttf").is_file()] == []


def test_pictures_have_the_form_of_the_handwritten_ones(printed: tuple[Tensor, Tensor]) -> None:
    images, labels = printed

    assert images.shape == (2000, 1, 8, 8)
    assert images.dtype == torch.float32
    assert images.min() == 0
    assert 0.9 < images.max() <= 1
    assert labels.bincount().tolist() == [200] * 10


def test_ink_is_bright_centered_and_about_as_heavy_as_handwriting(
    printed: tuple[Tensor, Tensor], handwritten: Tensor
) -> None:
    images = printed[0]

    # A negative, a shifted or a hairline set would miss these by far.
    assert images.mean().item() == pytest.approx(handwritten.mean().item(), abs=0.06)
    for measure in (_row_center, _column_center):
        assert measure(images) == pytest.approx(measure(handwritten), abs=0.4)


def test_no_picture_is_blank(printed: tuple[Tensor, Tensor]) -> None:
    assert printed[0].amax(dim=(1, 2, 3)).min() > 0.3


@pytest.mark.parametrize(("seed", "same"), [(3, True), (4, False)])
def test_the_seed_alone_decides(printed: tuple[Tensor, Tensor], seed: int, same: bool) -> None:
    torch.rand(7)

    assert torch.equal(render(2000, seed=seed)[0], printed[0]) is same


def test_rendering_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    render(20, seed=0)

    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(scope="module")
def handwritten() -> Tensor:
    from fedlora_flwr.tasks.digits import DigitsTask
    from tests.tasks.fixtures import settings

    return DigitsTask(settings()).test_records().batch(torch.arange(360))["image"]


def _center(axis: int) -> Callable[[Tensor], float]:
    def measure(images: Tensor) -> float:
        ink = images[:, 0].sum(dim=(0, 3 - axis))
        return float((ink * torch.arange(8)).sum() / ink.sum())

    return measure


_row_center, _column_center = _center(1), _center(2)
