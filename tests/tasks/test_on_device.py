"""What a device's own file must say, and that nothing is read from its records then."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.places import TASKS
from fedlora_flwr.tasks.registry import build_task, required_on_device
from tests.backbones.checkpoints import write_split
from tests.data.pictures import CLASSES, image_config, write_pictures
from tests.data.watching import opened_in
from tests.tasks import conversations, questions
from tests.tasks.texts import reviews, text_config

pytestmark = pytest.mark.usefixtures("empty_cache")
Checkpoint = Callable[[str], Path]
LANGUAGE = ("instruction-tuning", "question-answering", "text-classification")
STATED = {
    "class-names": {"class_names": "ant,bee,cat"},
    "num-classes": {"num_classes": 3},
    "both": {"class_names": "ant,bee,cat", "num_classes": 3},
}


@pytest.fixture
def make_config(
    checkpoint: Checkpoint,
    question_models: dict[str, Path],
    chat_models: dict[str, Path],
    tmp_path: Path,
) -> Callable[..., RunConfig]:
    """Return a function that writes records for a task and makes its configuration."""

    def make(task: str, **changes: Any) -> RunConfig:
        folder = tmp_path / task
        if task == "image-classification":
            return image_config(write_pictures(folder), **changes)
        model, rows = {
            "text-classification": (checkpoint("bert"), reviews(20)),
            "question-answering": (question_models["bert"], questions.messy_rows(20)),
            "instruction-tuning": (chat_models["llama"], conversations.messy_rows(20)),
        }[task]
        for split in ("train", "validation"):
            write_split(folder, split, rows)
        return text_config(model, folder, task=task, **changes)

    return make


def test_every_task_says_what_a_device_must_state() -> None:
    data, classes = (("model",), ("dataset",)), ("class-names", "num-classes")
    expected = {
        "digits": (),
        "image-classification": (*data, classes),
        "instruction-tuning": data,
        "question-answering": data,
        "text-classification": (*data, classes),
    }
    assert {name: tuple(required_on_device(name)) for name in expected} == expected
    for groups in map(required_on_device, TASKS):
        assert {key for group in groups for key in group} <= RunConfig().items().keys()
    assert required_on_device("my_module:MyTask") == ()
    with pytest.raises(InvalidValue, match="did you mean 'digits'"):
        required_on_device("digit")


def test_to_ask_imports_no_library() -> None:
    program = (
        "import sys\n"
        "from fedlora_flwr.tasks.registry import required_on_device\n"
        "required_on_device('text-classification')\n"
        "print([name for name in ('torch', 'datasets', 'numpy') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


CASES = [
    *((task, {}) for task in ("question-answering", "instruction-tuning")),
    *(
        (task, stated)
        for task in ("text-classification", "image-classification")
        for stated in STATED.values()
    ),
]


@pytest.mark.parametrize(("task", "stated"), CASES, ids=str)
def test_the_model_is_made_without_the_records(
    make_config: Callable[..., RunConfig], task: str, stated: dict[str, Any]
) -> None:
    config = make_config(task, **stated)
    with opened_in(Path(config.dataset)) as opened:
        built: Any = build_task(task, config)
        model = built.build_model()
        built.skeleton()
        batch = built.largest_batch(3)
        trainer = LocalTrainer.build(config, built)
        assert isinstance(built.lora_targets, str)
        assert isinstance(built.head, tuple)
        assert trainer.layout.names
        assert opened == []
        # The watch works.
        with pytest.raises(InvalidValue):
            build_task(task, make_config(task, train_split="no", **stated)).client_records(0, 1)
        assert opened != []
    assert len(next(iter(batch.values()))) == 3
    assert sum(parameter.numel() for parameter in model.parameters()) > 1000


@pytest.mark.parametrize(("task", "stated"), CASES, ids=str)
def test_the_model_is_the_same_on_any_device(
    make_config: Callable[..., RunConfig], tmp_path: Path, task: str, stated: dict[str, Any]
) -> None:
    """Also where there are no records at all."""
    config = make_config(task, **stated)
    here = LocalTrainer.build(config, build_task(task, config)).layout
    moved = RunConfig.of(config.items(), {"dataset": str(tmp_path / "nothing")})
    there = LocalTrainer.build(moved, build_task(task, moved)).layout
    assert here == there


def test_without_a_statement_the_records_tell(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("image-classification")
    with opened_in(Path(config.dataset)) as opened:
        built: Any = build_task(config.task, config)
        assert built.num_classes == len(CLASSES)
        assert opened != []
