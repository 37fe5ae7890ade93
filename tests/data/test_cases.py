"""Small data files of every kind in tests/cases, each with what is read of it or why it is not."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora_flwr.data.pictures import pixels
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.tasks.classifier_task import ClassifierTask
from fedlora_flwr.tasks.image_classification import ImageClassification
from fedlora_flwr.tasks.text_classification import TextClassification
from tests.data.pictures import SIZE, image_config
from tests.tasks.texts import text_config

CASES = Path(__file__).parents[1] / "cases"
pytestmark = pytest.mark.usefixtures("empty_cache")


def task_of(folder: Path, settings: dict[str, Any]) -> ClassifierTask:
    changes = {key.replace("-", "_"): value for key, value in settings.items()}
    if changes.pop("task", "") == "image-classification":
        return ImageClassification(image_config(folder, **changes))
    return TextClassification(text_config("no-model", folder, **changes))


def found(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Return what is read of a case, of the kinds that its file states."""
    settings = expected.get("settings", {})
    task = task_of(folder, settings)
    account = task.reading(1) if "test-split" in settings else [task.private_reading()]
    used, names = task._train, task._labels._order
    numbers = task._labels.numbers(used).tolist()
    result: dict[str, Any] = {
        "reading": [line for split in account for line in split.lines()],
        "classes": [names[number] for number in numbers] if names else numbers,
        "records": {
            name: ["" if value is None else value for value in used[name]]
            for name in expected.get("records", {})
        },
    }
    if isinstance(task, ImageClassification):
        images = np.array(pixels(used, "image", SIZE)["image"])
        assert (images == images[:, :1, :1, :1]).all()
        result["pixels"] = images[:, 0, 0, 0].tolist()
    return result


@pytest.mark.parametrize("folder", sorted(CASES.iterdir()), ids=lambda folder: folder.name)
def test_a_case_is_read_as_it_says_or_refused(folder: Path) -> None:
    expected = tomllib.loads((folder / "expected.toml").read_text(encoding="utf-8"))
    if "refused" in expected:
        with pytest.raises(InvalidValue) as caught:
            found(folder, expected)
        # What other packages say is left open.
        parts = expected["refused"].replace("{here}", str(folder)).split("…")
        assert re.fullmatch(".+".join(map(re.escape, parts)), str(caught.value)), caught.value
        return
    result = found(folder, expected)
    stated = {key: expected[key] for key in expected if key != "settings"}
    assert {key: result[key] for key in stated} == stated
