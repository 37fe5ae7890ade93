from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fedlora_flwr.backbones.pretrain_digits import Recipe
from fedlora_flwr.config import RunConfig
from fedlora_flwr.tasks.digits import DigitsTask
from tests.tasks import conversations, questions

QUICK = Recipe(images=200, steps=3, batch=16)


def settings(**changes: Any) -> RunConfig:
    """Return the settings that the tests share, but for ``changes``."""
    return RunConfig(**{"min_records": 32, **changes})


@pytest.fixture(scope="session")
def task() -> DigitsTask:
    return DigitsTask(settings())


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder of a tiny text model of a family, made once."""
    from tests.tasks.texts import make_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints")

    @cache
    def get(kind: str) -> Path:
        return make_checkpoint(kind, folder / kind)

    return get


@pytest.fixture(scope="session")
def question_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return questions.save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def make_questions(question_models: dict[str, Path], tmp_path: Path) -> questions.Make:
    return questions.task_maker(question_models, tmp_path / "set")


@pytest.fixture(scope="session")
def chat_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return conversations.save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def make_chats(chat_models: dict[str, Path], tmp_path: Path) -> conversations.Make:
    return conversations.task_maker(chat_models, tmp_path / "set")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path
