"""The forecast of memory is held against what a step takes."""

from __future__ import annotations

import pytest

from benchmarks.figures import Figure
from benchmarks.memory import five_shapes, measure
from tests.benchmarks.support import small_roberta


def test_the_error_is_the_difference_of_forecast_and_measurement() -> None:
    found: list[Figure] = []
    measure([small_roberta()], 8, found.append)
    assert len(found) == 2  # Few layers, and all of them.
    for figure in found:
        assert figure.reference is not None
        said = [float(word) for word in figure.note.split() if word.isdigit()]
        assert abs(said[0] - said[1]) == pytest.approx(figure.ours, abs=1.0)
        assert said[1] == pytest.approx(figure.reference, abs=0.5)


def test_text_and_image_models_give_five_shapes() -> None:
    assert sum(len(shape.targets) for shape in five_shapes()) == 5
