"""Extractive question answering on data sets of SQuAD's layout, on any transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlora_flwr.backbones.language_models import (
    load_config,
)
from fedlora_flwr.config import RunConfig
from fedlora_flwr.data.arrow_records import ArrowRecords, pad_collate
from fedlora_flwr.data.prepared import prepare
from fedlora_flwr.data.records import Batch, Records
from fedlora_flwr.errors import InvalidValue, unknown
from fedlora_flwr.lora.wide_numbers import with_fp64
from fedlora_flwr.tasks.answers import Answer, asked_order
from fedlora_flwr.tasks.evaluation import measured
from fedlora_flwr.tasks.language_task import LanguageTask
from fedlora_flwr.tasks.squad import exact_match, f1
from fedlora_flwr.tasks.tokens import check_ids
from fedlora_flwr.tasks.windows import (
    NO_TARGET,
    all_windows,
    check_room,
    gold_answers,
    misplaced,
    one_row_each,
    training_windows,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

ANSWERS = "answers"
_COLUMNS = ("question", "context", ANSWERS)
_TARGETS = ("start", "end")
_EVALUATION = ("none", "begins", "ends")
# How many starts and ends are candidates, and how many tokens an answer may have.
_BEST, _LONGEST = 20, 30


class QuestionAnswering(LanguageTask):
    """Find the answer to a question in a text.

    Columns of the data set are ``question``, ``context`` and ``answers``. As in SQuAD, ``answers``
    holds the texts and where they start in the context, and no text if the context has no answer.

    If question and context are longer than ``max-length`` tokens, the context is cut into windows;
    two neighbors share a third of ``max-length``. A private record is a *question* with one window:
    the first that holds its whole first answer, or the first window if none does. More windows per
    question would be several records of the same person, and the promise is for one record. The
    promise does not cover a *context* either: if several questions are about one text, each
    question is protected, but the text that they share is not.

    Batches are ``{"input_ids", "attention_mask", …: (n, t) int64, "start", "end": (n,) int64}``,
    padded to their longest record of t tokens. The answer is the tokens from start to end, both
    included. If there is no answer, it is the class token, or the first token of a model without a
    class token.

    Parameters
    ----------
    settings : RunConfig
        Model, data set and split; ``label_column`` is not read.

    Raises
    ------
    InvalidValue
        As the base class; or ``report-unprotected-metrics`` asks for figures of private records,
        which need all windows of a question and not only one.
    """

    name = "question-answering"
    metric = "f1"

    def __init__(self, settings: RunConfig) -> None:
        super().__init__(settings)
        if settings.report_unprotected_metrics:
            allowed = (
                f"false where task = {self.name!r}: clients keep one window of each question, but "
                "figures need all windows"
            )
            raise InvalidValue("report-unprotected-metrics", True, allowed)

    def largest_batch(self, records: int) -> Batch:
        """Return windows of ``max-length`` tokens."""
        return {
            **self._largest_inputs(records),
            **{name: torch.zeros(records, dtype=torch.int64) for name in _TARGETS},
        }

    def made_up_batch(self, records: int) -> Batch:
        """Return windows of random words of up to ``max-length`` tokens, without an answer."""
        texts = self._made_up_inputs(records, pair=True)
        return {**texts, **{name: torch.zeros(records, dtype=torch.int64) for name in _TARGETS}}

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross entropy of an answer's start and end, shape (n,)."""
        return _losses(*self._scores(model, batch), batch)

    def evaluate(self, model: nn.Module, records: Records) -> dict[str, float]:
        """Measure a model on questions, each with all its windows.

        The model's answer is the best span of at most 30 tokens in all windows of a question, among
        the 20 best starts and the 20 best ends of each window. If the data set has questions
        without an answer, the model answers "none" where the lowest score of "none" among the
        windows is above the score of that span.

        Parameters
        ----------
        model : nn.Module
            The model, in evaluation mode during the call. Batches are moved to its device.
        records : Records
            The records of `test_records`.

        Returns
        -------
        dict[str, float]
            Means over questions: ``f1`` and ``exact_match`` in [0, 1]
            (`fedlora_flwr.tasks.squad`), and ``loss``, of the one window that a private record
            would have.

        Raises
        ------
        InvalidValue
            There are no records.
        """

        def measure(batch: Batch) -> Tensor:
            return _measured(*self._scores(model, batch), batch)

        size = self._settings.eval_batch_size
        question, target, loss, *found = measured(model, records, size, measure).numpy()
        contexts = self._test.select_columns("context")
        may_be_none = not all(self._golds)
        questions, predictions = _answers(question.astype(np.int64), found, contexts, may_be_none)
        golds = [self._golds[question] for question in questions]
        pairs = list(zip(predictions, golds, strict=True))
        return {
            "loss": float(loss[target > 0].mean()),
            "f1": float(np.mean([f1(*pair) for pair in pairs])),
            "exact_match": float(np.mean([exact_match(*pair) for pair in pairs])),
        }

    def _scores(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return each token's scores as start and as end of the answer, of shape (n, t), fp32."""
        found = model(**{name: batch[name] for name in self._inputs})
        # Without the mask, a record's loss would depend on the padding of its batch.
        padding = batch["attention_mask"] == 0
        starts, ends = (
            scores.float().masked_fill(padding, -torch.inf)
            for scores in (found.start_logits, found.end_logits)
        )
        return starts, ends

    def predictions(self, model: nn.Module, dataset: Dataset) -> dict[str, list[str]]:
        """Return the model's answer to each question, as `evaluate` finds it.

        An answer is never empty, unless the data set has a column ``answers`` in which some
        question has none.

        Raises
        ------
        InvalidValue
            A column is missing.
        """
        given = ANSWERS in dataset.features
        may_be_none = given and not all(map(gold_answers, dataset[ANSWERS]))
        return {"answer": self._said(model, dataset, may_be_none)}

    def answers(self, model: nn.Module) -> list[Answer]:
        """Return the model's answers to some public questions, as `evaluate` finds them.

        Questions without a right answer, and those that are private, too, are not asked.

        Parameters
        ----------
        model : nn.Module
            The model, in evaluation mode during the call.

        Returns
        -------
        list[Answer]
            At most ``generation-limit`` answers, to the same questions in each call.

        Raises
        ------
        InvalidValue
            No public question can be asked.
        """
        limit, private = self._settings.generation_limit, self._also_private()
        golds = [[text for text in texts if text.strip()] for texts in self._golds]
        order = asked_order(len(golds)).tolist()
        asked = [place for place in order if golds[place] and place not in private][:limit]
        if not asked:
            allowed = "0, as no public question that is not private has a right answer"
            raise InvalidValue("generation-limit", limit, allowed)
        questions = self._test.select(asked)
        said = self._said(model, questions, may_be_none=not all(self._golds))
        rows = zip(questions["question"], asked, said, strict=True)
        return [Answer(text, tuple(golds[place]), answer) for text, place, answer in rows]

    def _said(self, model: nn.Module, dataset: Dataset, may_be_none: bool) -> list[str]:
        for name in ("question", "context"):
            if name not in dataset.features:
                raise unknown("data", name, dataset.features, before="a column that is there: ")
        if ANSWERS not in dataset.features:
            nothing: dict[str, list[Any]] = {"text": [], "answer_start": []}
            dataset = dataset.add_column(ANSWERS, [nothing] * len(dataset))
        windows = self._windows(dataset, training=False)

        def measure(batch: Batch) -> Tensor:
            return _measured(*self._scores(model, batch), batch)

        size = self._settings.eval_batch_size
        question, _, _, *found = measured(model, windows, size, measure).numpy()
        contexts = dataset.select_columns("context")
        return _answers(question.astype(np.int64), found, contexts, may_be_none)[1]

    @cached_property
    def _golds(self) -> list[list[str]]:
        """The right answers to each public question."""
        return [[text for text, _ in gold_answers(value)] for value in self._test["answers"]]

    @property
    def _auto(self) -> Any:
        from transformers import AutoModelForQuestionAnswering

        return AutoModelForQuestionAnswering

    @cached_property
    def _config(self) -> PretrainedConfig:
        # The head has one output per label.
        return load_config(self._settings, num_labels=len(_TARGETS))

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        check_room(self._settings.max_length, tokenizer)

    def _input_columns(self, dataset: Dataset) -> list[str]:
        for name in _COLUMNS:
            if name not in dataset.features:
                allowed = f"one with columns {', '.join(_COLUMNS)}, not {list(dataset.features)}"
                raise InvalidValue("dataset", self._settings.dataset, allowed)
        return [name for name in _COLUMNS if name != ANSWERS]

    def _notes(self, dataset: Dataset) -> list[str]:
        wrong = misplaced(dataset)
        text = f"questions whose answer is not at its place in the context: {wrong:,}"
        return [*super()._notes(dataset), *([text] if wrong else [])]

    def _prepare(self, dataset: Dataset, *, training: bool) -> ArrowRecords:
        self._input_columns(dataset)
        return self._windows(dataset, training=training)

    def _windows(self, dataset: Dataset, *, training: bool) -> ArrowRecords:
        tokenizer, limit = self._tokenizer, self._settings.max_length
        cut = training_windows if training else all_windows
        prepared = prepare(
            dataset,
            partial(cut, tokenizer=tokenizer, limit=limit),
            {"tokenizer": self._tokenizer_text, "none": tokenizer.cls_token_id, "limit": limit},
            [*self._inputs, *_TARGETS, *(() if training else _EVALUATION)],
            packages=["tokenizers", "transformers"],
        )
        check_ids(prepared, self._config)
        padding = {"input_ids": tokenizer.pad_token_id or 0, "begins": -1, "ends": -1}
        collate = pad_collate(padding, limit=limit)
        return ArrowRecords(prepared if training else one_row_each(prepared), collate)


def _answers(
    question: NDArray[np.int64],
    found: Sequence[NDArray[np.float64]],
    texts: Dataset,
    may_be_none: bool,
) -> tuple[list[int], list[str]]:
    """Return the questions that windows belong to, and the model's answer to each."""
    none, score, begin, end = found
    order = np.lexsort((-score, question))
    questions, first = np.unique(question[order], return_index=True)
    best = order[first]
    lowest = np.minimum.reduceat(none[order], first)
    answered = np.isfinite(score[best])
    if may_be_none:
        answered &= ~(lowest > score[best])
    contexts = texts[questions]["context"]
    spans = zip(contexts, begin[best].astype(int), end[best].astype(int), answered, strict=True)
    said = [context[begin:end] if some else "" for context, begin, end, some in spans]
    return questions.tolist(), said


def _losses(starts: Tensor, ends: Tensor, batch: Batch) -> Tensor:
    """Return the loss of each window; 0 for windows without a target."""
    start, end = (
        F.cross_entropy(scores, batch[name], reduction="none", ignore_index=NO_TARGET)
        for name, scores in zip(_TARGETS, (starts, ends), strict=True)
    )
    return (start + end) / 2


def _measured(starts: Tensor, ends: Tensor, batch: Batch) -> Tensor:
    """Return the figures of each window from which answers follow: fp64, shape (7, n).

    The rows are: the question, whether the window has a target, its loss, the score of no answer,
    the score of its best span, and where this span begins and ends in the context.
    """
    none = batch["none"].unsqueeze(1)
    score, first, last = _best_span(starts, ends, batch["begins"] >= 0)
    columns = (
        batch["question"],
        batch["start"] != NO_TARGET,
        _losses(starts, ends, batch),
        (starts.gather(1, none) + ends.gather(1, none)).squeeze(1),
        score,
        batch["begins"].gather(1, first).squeeze(1),
        batch["ends"].gather(1, last).squeeze(1),
    )
    return torch.stack([with_fp64(column).double() for column in columns])


def _best_span(starts: Tensor, ends: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the score of each window's best span, shape (n,), and its ends, both (n, 1).

    The score is minus infinity if no pair of the best starts and ends is a span of the context.
    """
    k = min(_BEST, starts.shape[1])
    start, first = starts.masked_fill(~inside, -torch.inf).topk(k)
    end, last = ends.masked_fill(~inside, -torch.inf).topk(k)
    beyond = last.unsqueeze(1) - first.unsqueeze(2)
    scores = (start.unsqueeze(2) + end.unsqueeze(1)).masked_fill(
        (beyond < 0) | (beyond >= _LONGEST), -torch.inf
    )
    score, place = scores.flatten(1).max(dim=1, keepdim=True)
    return score.squeeze(1), first.gather(1, place // k), last.gather(1, place % k)
