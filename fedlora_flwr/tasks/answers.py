"""Figures of the answers that a model writes to public records, and which records are asked.

Only a server, and a user who measures an adapter, ask for answers. No client does, because an
answer may repeat what a model has learned by heart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.tasks.registry import optional

if TYPE_CHECKING:
    from torch import nn

    from fedlora_flwr.data.records import Records
    from fedlora_flwr.tasks.registry import Task

# Not the run's seed: different runs must be asked the same.
_SEED = 2024


@dataclass(frozen=True)
class Answer:
    """A model's answer to one record.

    Parameters
    ----------
    prompt : str
        What was asked, for people to read.
    right : tuple[str, ...]
        The right answers, at least one.
    said : str
        What the model says.
    """

    prompt: str
    right: tuple[str, ...]
    said: str


def figures(answers: Sequence[Answer]) -> dict[str, float]:
    """Compare answers with the right ones.

    Parameters
    ----------
    answers : Sequence[Answer]
        At least one answer.

    Returns
    -------
    dict[str, float]
        Means over the answers, in [0, 1], each against the closest right answer: ``rouge_l``, the
        F-measure of the longest common subsequence of words (Lin, "ROUGE: a package for automatic
        evaluation of summaries", 2004) as the package rouge-score computes it, without stemming;
        and ``exact_match``, the share that is equal to a right answer but for space around it.

    Notes
    -----
    rouge-score reads the letters a to z and digits alone. For other scripts its figure means
    nothing.

    Raises
    ------
    ModuleNotFoundError
        rouge-score is not installed.

    Examples
    --------
    >>> found = figures([Answer("?", ("in the old town", "downtown"), "the old town")])
    >>> round(found["rouge_l"], 3), found["exact_match"]
    (0.857, 0.0)
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    rouge = [scorer.score_multi(one.right, one.said)["rougeL"].fmeasure for one in answers]
    hits = [one.said.strip() in {text.strip() for text in one.right} for one in answers]
    return {"rouge_l": float(np.mean(rouge)), "exact_match": float(np.mean(hits))}


def measured(
    task: Task, model: nn.Module, records: Records, *, write: bool
) -> tuple[dict[str, float], list[Answer]]:
    """Measure a model on records and, if asked to, on the answers that it writes.

    Parameters
    ----------
    task : Task
        The task.
    model : nn.Module
        The model.
    records : Records
        Public records of the task.
    write : bool
        Whether the model answers some of the task's public records. The task's
        ``generation-limit`` says how many.

    Returns
    -------
    tuple[dict[str, float], list[Answer]]
        The task's metrics with those of `figures` that it does not have itself, and the answers.
    """
    metrics = dict(task.evaluate(model, records))
    answers = optional(task, "answers")
    if not write or answers is None:
        return metrics, []
    said: list[Answer] = answers(model)
    written = {name: value for name, value in figures(said).items() if name not in metrics}
    return {**metrics, **written}, said


def asked_order(count: int) -> NDArray[np.int64]:
    """Return the positions of so many records in the order in which they are asked.

    It is random, because files are often sorted, and the same in each run.
    """
    return np.random.default_rng(_SEED).permutation(count)
