"""Windows of contexts that are too long for a model, each with the question and its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.errors import InvalidValue

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

# torch's cross entropy leaves out records with this label.
NO_TARGET = -100
_ROWS = 256

Columns = dict[str, list[Any]]
Row = dict[str, Any]


def gold_answers(value: Any) -> list[tuple[str, int]]:
    """Return the right answers to a question, and where in its context they start, in characters.

    Parameters
    ----------
    value : Any
        A record's ``answers``: lists under ``text`` and ``answer_start``, or a list of mappings
        with these keys. Blank texts are left out.
    """
    if isinstance(value, Mapping):
        pairs = list(zip(value["text"] or (), value["answer_start"] or (), strict=True))
    else:
        pairs = [(answer["text"], answer["answer_start"]) for answer in value or ()]
    return [(text, start) for text, start in pairs if text and text.strip()]


def misplaced(dataset: Dataset) -> int:
    """Count the questions with a first answer that is not where the context should have it.

    Parameters
    ----------
    dataset : Dataset
        With columns ``context`` and ``answers``.
    """
    wrong = 0
    for start in range(0, len(dataset), _ROWS):
        rows = dataset[start : start + _ROWS]
        for context, answers in zip(rows["context"], rows["answers"], strict=True):
            try:
                for text, begin in gold_answers(answers)[:1]:
                    wrong += (context or "")[begin : begin + len(text)] != text
            except (KeyError, TypeError, ValueError):  # Preparing the records refuses it by name.
                wrong += 1
    return wrong


def check_room(limit: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse windows so short that the next one might begin at the same token of a context.

    Raises
    ------
    InvalidValue
        ``max-length`` is too small.
    """
    least = 3 * (tokenizer.num_special_tokens_to_add(pair=True) + 1)
    if limit < least:
        raise InvalidValue("max-length", limit, f"at least {least}")


def training_windows(rows: Columns, *, tokenizer: PreTrainedTokenizerBase, limit: int) -> Columns:
    """Return one window of each question: the first that holds its whole first answer.

    If there is no answer, or no window holds it, it is the first window.

    Parameters
    ----------
    rows : dict[str, list]
        ``question``, ``context`` and ``answers`` of n records.
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer.
    limit : int
        Tokens of a window. The question is cut to a third of them, and two neighboring windows
        share a third.

    Returns
    -------
    dict[str, list]
        For each record: the model's inputs, the tokens ``start`` and ``end`` of the answer, and
        ``none``, the token that stands for no answer. For each token: where it ``begins`` and
        ``ends`` in the context, in characters, and -1 outside the context.
    """
    chosen = [
        next(window for window in windows if window["start"] != NO_TARGET)
        for windows in _windows(rows, tokenizer, limit)
    ]
    return {name: [window[name] for window in chosen] for name in chosen[0]}


def all_windows(rows: Columns, *, tokenizer: PreTrainedTokenizerBase, limit: int) -> Columns:
    """Return lists of all windows of each question; only one of them has a target.

    Parameters and columns are those of `training_windows`. ``start`` and ``end`` are `NO_TARGET` in
    the windows that `training_windows` would leave out.
    """
    found = _windows(rows, tokenizer, limit)
    return {name: [[window[name] for window in each] for each in found] for name in found[0][0]}


def one_row_each(questions: Dataset) -> Dataset:
    """Turn one row per question into one row per window.

    The new column ``question`` holds the position of each window's question.

    Parameters
    ----------
    questions : Dataset
        Rows with the columns of `all_windows`. Nothing is copied.
    """
    import datasets
    import pyarrow as pa
    import pyarrow.compute as pc

    nested = questions.data.table
    counts = pc.list_value_length(nested.column("start")).to_numpy()
    columns = {name: pc.list_flatten(nested.column(name)) for name in nested.column_names}
    columns["question"] = np.repeat(np.arange(len(counts)), counts)
    table = datasets.table.InMemoryTable(pa.table(columns))
    # Without a given fingerprint, the library would read the whole table to compute one.
    return datasets.Dataset(table, fingerprint=f"{questions._fingerprint}-windows")


def _windows(rows: Columns, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[list[Row]]:
    questions, contexts = (_encoded(rows[name], tokenizer) for name in ("question", "context"))
    special = tokenizer.num_special_tokens_to_add(pair=True)
    found = []
    for question, context, answers in zip(questions, contexts, rows["answers"], strict=True):
        question.truncate(limit // 3)
        context.truncate(limit - special - len(question), stride=limit // 3)
        parts = [context, *context.overflowing]
        windows = [_window(question, part, tokenizer) for part in parts]
        _set_target(windows, gold_answers(answers))
        found.append(windows)
    return found


def _encoded(texts: list[str | None], tokenizer: PreTrainedTokenizerBase) -> list[Encoding]:
    found = tokenizer([text or "" for text in texts], add_special_tokens=False, verbose=False)
    encodings: list[Encoding] = found.encodings
    return encodings


def _window(question: Encoding, part: Encoding, tokenizer: PreTrainedTokenizerBase) -> Row:
    pair = tokenizer.backend_tokenizer.post_process(question, part)
    inputs = {
        "input_ids": pair.ids,
        "attention_mask": pair.attention_mask,
        "token_type_ids": pair.type_ids,
    }
    # Offsets come from the part: post-processing may move those of the pair by a leading blank.
    places = np.full((len(pair), 2), -1)
    places[[which == 1 for which in pair.sequence_ids]] = np.array(part.offsets).reshape(-1, 2)
    begins, ends = places.T
    none = _none_at(pair.ids, tokenizer.cls_token_id)
    return {**inputs, "begins": begins, "ends": ends, "none": none}


def _none_at(tokens: list[int], class_token: int | None) -> int:
    return tokens.index(class_token) if class_token in tokens else 0


def _set_target(windows: list[Row], answers: Sequence[tuple[str, int]]) -> None:
    for window in windows:
        window["start"] = window["end"] = NO_TARGET
    for text, begin in answers[:1]:
        # Blanks around an answer may be in no token.
        begin += len(text) - len(text.lstrip())
        end = begin + len(text.strip())
        for window in windows:
            if place := _place(window["begins"], window["ends"], begin, end):
                window["start"], window["end"] = place
                return
    windows[0]["start"] = windows[0]["end"] = windows[0]["none"]


def _place(
    begins: NDArray[np.int64], ends: NDArray[np.int64], begin: int, end: int
) -> tuple[int, int] | None:
    """Return the first and last token of characters ``begin`` to ``end`` if the window has all."""
    inside = np.flatnonzero(begins >= 0)
    if not len(inside) or begin < begins[inside[0]] or end > ends[inside[-1]]:
        return None
    first = inside[ends[inside] > begin][0]
    last = inside[begins[inside] < end][-1]
    return (int(first), int(last)) if first <= last else None
