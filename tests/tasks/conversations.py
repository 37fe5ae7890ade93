"""Conversations of all shapes in toy words."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedlora_flwr.tasks.instruction_tuning import InstructionTuning
from tests.backbones import checkpoints
from tests.tasks.tiny_tasks import WORDS, Row
from tests.tasks.tiny_tasks import make_task as tiny_task

TEXTS = [" ".join([*WORDS, "yes it is", "system user assistant"])] * 3
LAYERS = {
    "llama": r".*\.(q_proj|v_proj|o_proj|up_proj|down_proj)",
    "gpt2": r".*\.(c_attn|c_proj|c_fc)",
}

Make = Callable[..., InstructionTuning]


def save_models(folder: Path) -> dict[str, Path]:
    return {name: getattr(checkpoints, name)(folder / name, TEXTS) for name in LAYERS}


def task_maker(models: Mapping[str, Path], folder: Path) -> Make:
    """Return a function that makes the task on records, with a named model or a folder's."""

    def make(
        rows: Sequence[Row], model: str | Path = "llama", **changes: object
    ) -> InstructionTuning:
        place = Path(models.get(str(model), model))
        return tiny_task(InstructionTuning, folder, rows, place, **{"max_length": 64, **changes})

    return make


def chat(*turns: tuple[str, str]) -> Row:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def said(rng: random.Random) -> str:
    return " ".join(rng.choices([*WORDS, "naïve", "“x”", "km."], k=rng.randrange(8)))


def messy_rows(count: int) -> list[Row]:
    """Return conversations of all shapes, some without an answer."""
    rng, rows = random.Random(1), []
    for i in range(count):
        turns = [("system", said(rng))] if i % 3 == 0 else []
        for _ in range(i % 4):
            turns += [("user", said(rng)), ("assistant", said(rng))]
        rows.append(chat(*turns, *([("user", said(rng))] if i % 2 or not turns else [])))
    return rows
