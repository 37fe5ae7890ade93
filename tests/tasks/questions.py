"""Questions of all shapes on texts of toy words, and their windows cut by hand."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora_flwr.tasks.question_answering import QuestionAnswering
from tests.backbones import checkpoints
from tests.tasks.tiny_tasks import WORDS, Row
from tests.tasks.tiny_tasks import make_task as tiny_task

NUMBERS = ["one", "two", "three", "four", "five"]
LINE = " ".join(WORDS[:40])
# The tokens around question and context.
SPECIAL = {"bert": ([2], [3], [3]), "roberta": ([0], [2, 2], [2])}

Window = tuple[list[int], list[tuple[int, int] | None]]
Make = Callable[..., QuestionAnswering]


def save_models(folder: Path) -> dict[str, Path]:
    texts = [" ".join(WORDS + NUMBERS)] * 5
    return {name: getattr(checkpoints, name)(folder / name, texts) for name in SPECIAL}


def task_maker(models: Mapping[str, Path], folder: Path) -> Make:
    """Return a function that makes the task on records, with a named model or a folder's."""

    def make(
        rows: Sequence[Row], model: str | Path = "bert", **changes: object
    ) -> QuestionAnswering:
        place = Path(models.get(str(model), model))
        return tiny_task(QuestionAnswering, folder, rows, place, **changes)

    return make


def row(context: str, *answers: tuple[str, int], question: str = "bali balu") -> Row:
    texts, starts = [text for text, _ in answers], [start for _, start in answers]
    return {
        "question": question,
        "context": context,
        "answers": {"text": texts, "answer_start": starts},
    }


def messy_rows(count: int) -> list[Row]:
    """Return records with pieces of words, blanks, long answers, and questions without one."""
    rng, rows = random.Random(1), []
    words = [*WORDS, "balidona", "xyz", "km,", "(one)", "née"]
    for _ in range(count):
        context = rng.choice(["", " "]) + "".join(
            word + rng.choice([" ", " ", "  ", "-"])
            for word in rng.choices(words, k=rng.randrange(70))
        )
        answers = []
        for _ in range(rng.choice([0, 1, 1, 1, 2]) if context.strip() else 0):
            begin = rng.randrange(len(context))
            text = context[begin : begin + rng.choice([1, 4, 9, 30, 200])]
            answers.append((text, begin))
        question = " ".join(rng.choices(words, k=rng.choice([0, 2, 5, 40])))
        rows.append(row(context, *answers, question=question))
    return rows


def windows_of(
    tokenizer: Any, model: str, question: str, context: str, limit: int
) -> Iterator[Window]:
    """Cut a context by hand; yield tokens, and of each its place in the context."""
    first, middle, last = SPECIAL[model]
    asked = tokenizer(question, add_special_tokens=False)["input_ids"][: limit // 3]
    told = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
    tokens, places = told["input_ids"], told["offset_mapping"]
    room = limit - len(asked) - len(first + middle + last)
    start = 0
    while True:
        part = slice(start, start + room)
        yield (
            first + asked + middle + tokens[part] + last,
            [None] * len(first + asked + middle) + places[part] + [None] * len(last),
        )
        if start + room >= len(tokens):
            return
        start += room - limit // 3
