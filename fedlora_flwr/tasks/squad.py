"""Exact match and F1 of answers, as SQuAD defines them (arXiv:1606.05250, arXiv:1806.03822)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if a predicted answer is one of the right ones, else 0.

    Parameters
    ----------
    prediction : str
        The predicted text. Empty text says that there is no answer.
    answers : Sequence[str]
        The right answers. A question without an answer has none, or only articles and punctuation.
    """
    return _best(prediction, answers, lambda found, right: float(found == right))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the F1 of a predicted answer's words, in [0, 1], against the closest right answer.

    Words count as often as they occur. If one of the two has no words, F1 is 1 if the other has
    none either, and otherwise 0.
    Parameters are those of `exact_match`.
    """
    return _best(prediction, answers, _overlap)


def normalize(text: str) -> str:
    """Return text in lower case, without ASCII punctuation and articles, one space between words.

    >>> normalize("The  U.S.A., an ally")
    'usa ally'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _best(prediction: str, answers: Sequence[str], score: Callable[[str, str], float]) -> float:
    right = [text for text in map(normalize, answers) if text] or [""]
    found = normalize(prediction)
    return max(score(found, text) for text in right)


def _overlap(found: str, right: str) -> float:
    if not found or not right:
        return float(found == right)
    ours, theirs = found.split(), right.split()
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))
