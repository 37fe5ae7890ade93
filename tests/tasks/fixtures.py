from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fedlora_flwr.config import RunConfig

# Imported where they are needed: every process of pytest loads this file, and one of them runs no
# test, for which all others wait.
if TYPE_CHECKING:
    from fedlora_flwr.tasks.digits import DigitsTask
    from tests.tasks import conversations, questions


def settings(**changes: Any) -> RunConfig:
    """Return the settings that the tests share, but for ``changes``."""
    return RunConfig(**{"min_records": 32, **changes})


@pytest.fixture(scope="session")
def task() -> DigitsTask:
    from fedlora_flwr.tasks.digits import DigitsTask

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
    from tests.tasks import questions

    return questions.save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def make_questions(question_models: dict[str, Path], tmp_path: Path) -> questions.Make:
    from tests.tasks import questions

    return questions.task_maker(question_models, tmp_path / "set")


@pytest.fixture(scope="session")
def chat_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tests.tasks import conversations

    return conversations.save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def make_chats(chat_models: dict[str, Path], tmp_path: Path) -> conversations.Make:
    from tests.tasks import conversations

    return conversations.task_maker(chat_models, tmp_path / "set")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path
