from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from fedlora_flwr.tasks.squad import exact_match, f1
from fedlora_flwr.tasks.windows import gold_answers
from tests.backbones import checkpoints
from tests.tasks.questions import (
    LINE,
    Window,
    messy_rows,
    row,
    windows_of,
)
from tests.tasks.tiny_tasks import WORDS, all_records

pytestmark = pytest.mark.usefixtures("empty_cache")


class Scorer(nn.Module):
    """Scores tokens by what they are and where they stand, no answer also by all the others."""

    def __init__(self, tokens: int, none: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.tokens = nn.Parameter(scale * torch.randn(tokens, 2, generator=generator))
        self.shapes: list[torch.Size] = []
        self.places = nn.Parameter(scale * torch.randn(200, 2, generator=generator))
        with torch.no_grad():
            self.tokens[0] = 0.0  # Padding.
            self.tokens[2] = none

    def forward(self, input_ids: Tensor, **_: Tensor) -> SimpleNamespace:
        self.shapes.append(input_ids.shape)
        tokens = self.tokens[input_ids]
        scores = tokens + self.places[: input_ids.shape[1]]
        scores[:, 0] += tokens[:, 1:].sum(1) / 8
        start, end = scores.unbind(-1)
        return SimpleNamespace(start_logits=start, end_logits=end)


def answer_of(model: Scorer, windows: Sequence[Window], context: str, may_be_none: bool) -> str:
    """Return the best answer by a search over all pairs of tokens."""
    spans, nones = [(-torch.inf, 0, 0)], []
    for tokens, places in windows:
        found = model(torch.tensor([tokens]))
        starts, ends = found.start_logits[0].tolist(), found.end_logits[0].tolist()
        inside = [i for i, place in enumerate(places) if place]
        first = sorted(inside, key=lambda i: -starts[i])[:20]
        last = sorted(inside, key=lambda i: -ends[i])[:20]
        nones.append(starts[0] + ends[0])
        spans += [
            (starts[i] + ends[j], places[i][0], places[j][1])  # type: ignore[index]
            for i in first
            for j in last
            if i <= j < i + 30
        ]
    score, begin, end = max(spans, key=lambda span: span[0])
    return "" if may_be_none and min(nones) > score else context[begin:end]


@pytest.mark.parametrize(("answerable", "none"), [(False, 5.0), (False, -9.0), (True, 9.0)])
@pytest.mark.parametrize("limit", [16, 48])
def test_predictions_are_those_of_a_search_over_all_spans(
    make_questions: Any, answerable: bool, none: float, limit: int
) -> None:
    rows = [row for row in messy_rows(80) if not answerable or gold_answers(row["answers"])]
    task = make_questions(rows, max_length=limit, eval_batch_size=7)
    tokenizer = AutoTokenizer.from_pretrained(task._settings.model)
    model = Scorer(len(tokenizer), none / 2)
    model.train()

    measured = task.evaluate(model, task.test_records())

    assert model.training
    # Windows of like length come together.
    assert max(size for size, _ in model.shapes) == 7
    assert [width for _, width in model.shapes] == sorted(width for _, width in model.shapes)
    found = []
    for record in rows:
        texts = record["answers"]["text"]
        question, context = record["question"], record["context"]
        windows = list(windows_of(tokenizer, "bert", question, context, limit))
        said = answer_of(model, windows, context, not answerable)
        found.append((said, [text for text in texts if text.strip()]))
    losses = [task.losses(model, record).item() for record in all_records(task, True)]
    assert measured["exact_match"] == pytest.approx(np.mean([exact_match(*pair) for pair in found]))
    assert measured["f1"] == pytest.approx(np.mean([f1(*pair) for pair in found]))
    assert measured["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    if none == 5.0:
        empty = [said == "" for said, _ in found]
        assert 0.1 < np.mean(empty) < 0.9
    order = torch.randperm(len(task.test_records()), generator=torch.Generator().manual_seed(0))
    shuffled = task.test_records().subset(order.numpy())
    assert task.evaluate(model, shuffled) == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize(
    ("scores", "answer", "said"),
    [
        ({3: (5, 0), 5: (0, 5)}, WORDS[3], " ".join(WORDS[3:6])),
        ({3: (1, 5), 5: (4, 0)}, WORDS[3], WORDS[3]),  # Nothing ends before it starts.
        ({3: (5, 5)}, WORDS[3], WORDS[3]),
        ({2: (5, 0), 31: (0, 5)}, WORDS[2], " ".join(WORDS[2:32])),  # 30 tokens.
        ({2: (5, 0), 32: (0, 4)}, WORDS[2], WORDS[2]),  # 31 of them.
        # The end that the best start would take is only the 21st best.
        (
            {i: (0.0, 2.0 if i == 29 else 1.0) for i in range(10, 30)}
            | {35: (9.0, 0.0), 36: (0.0, 0.5)},
            WORDS[29],
            WORDS[29],
        ),
        # Here it is the 20th.
        (
            dict.fromkeys(range(10, 29), (0.0, 1.0)) | {35: (9.0, 0.0), 36: (0.0, 0.5)},
            WORDS[35],
            " ".join(WORDS[35:37]),
        ),
    ],
)
def test_the_best_span_by_hand(
    make_questions: Any, scores: Mapping[int, tuple[float, float]], answer: str, said: str
) -> None:
    task = make_questions([row(LINE, (answer, LINE.index(answer)))])
    tokenizer = AutoTokenizer.from_pretrained(task._settings.model)
    # A little for the shorter span, so that there are no ties.
    model = Scorer(len(tokenizer), 100.0, scale=0.0)
    with torch.no_grad():
        for i, word in enumerate(WORDS[:40]):
            start, end = scores.get(i, (0.0, 0.0))
            values = torch.tensor([start + i / 1e3, end - i / 1e3])
            model.tokens[tokenizer.convert_tokens_to_ids(word)] = values

    measured = task.evaluate(model, task.test_records())

    assert measured["f1"] == pytest.approx(f1(said, [answer]))
    assert measured["exact_match"] == float(said == answer)


def test_where_the_best_starts_and_ends_make_no_span_nothing_is_said(
    make_questions: Any, tmp_path: Path
) -> None:
    folder = checkpoints.bert(tmp_path / "long", [" ".join(WORDS)] * 5, positions=128)
    context = " ".join([*WORDS, *WORDS[:36]])
    task = make_questions([row(context, (context, 0))], folder, max_length=128)
    model = Scorer(200, scale=0.0)
    with torch.no_grad():
        model.places[10:30, 0] = 9.0
        model.places[80:100, 1] = 9.0

    assert task.evaluate(model, task.test_records())["f1"] == 0


def test_no_answer_wins_where_its_lowest_score_is_above_the_best_span(make_questions: Any) -> None:
    # The second of two windows of the first question is without its answer.
    rows = [row(LINE, (WORDS[5], LINE.index(WORDS[5]))), row(WORDS[9])]
    task = make_questions(rows, max_length=30)
    tokenizer = AutoTokenizer.from_pretrained(task._settings.model)
    model = Scorer(len(tokenizer), 1.0, scale=0.0)
    first = tokenizer.convert_tokens_to_ids(WORDS[5])

    def said(best: float, none: float) -> list[float]:
        with torch.no_grad():
            model.tokens[first] = best / 2
            model.tokens[2] = none / 2
        measured = task.evaluate(model, task.test_records())
        return [measured["exact_match"], measured["f1"]]

    assert said(3.0, 2.0) == [1, 1]  # The first answered, the second not.
    assert said(2.0, 2.0) == [1, 1]  # Even is not above.
    assert said(2.0, 3.0) == [0.5, 0.5]  # Neither.
    assert said(2.0, -1.0) == [0.5, 0.5]  # Both.
