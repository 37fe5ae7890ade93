"""Conversations as tokens, by the chat template of a model's tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.data.names import names
from fedlora_flwr.errors import InvalidValue, unknown

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# torch's cross entropy leaves out tokens with this label.
IGNORED = -100

Chat = list[dict[str, str]]


def chat_columns(dataset: Dataset, chosen: str) -> list[str]:
    """Return the column of conversations, or those of prompts and responses.

    Parameters
    ----------
    dataset : Dataset
        The split.
    chosen : str
        Names with commas between them. Empty: ``messages`` if the split has it, otherwise
        ``prompt,response``.

    Raises
    ------
    InvalidValue
        A column is missing, or more than two are named.
    """
    usual = ["messages"] if "messages" in dataset.features else ["prompt", "response"]
    found = list(names(chosen)) or usual
    if len(found) > 2:
        raise InvalidValue("input-columns", chosen, "one column of conversations, or two of text")
    for name in found:
        if name not in dataset.features:
            raise unknown("input-columns", name, dataset.features, value=chosen)
    return found


def prompt_columns(dataset: Dataset, chosen: str) -> list[str]:
    """Return the column of conversations, or that of prompts; answers are not needed.

    Parameters and errors are those of `chat_columns`.
    """
    usual = "messages" if "messages" in dataset.features else "prompt"
    found = (list(names(chosen)) or [usual])[:1]
    if found[0] not in dataset.features:
        raise unknown("input-columns", found[0], dataset.features, value=chosen or None)
    return found


def prompt_of(
    values: tuple[Any, ...], columns: list[str], tokenizer: PreTrainedTokenizerBase
) -> str:
    """Return a conversation as a model reads it before it answers.

    Parameters
    ----------
    values : tuple
        A conversation, or a prompt as text.
    columns : list[str]
        The column that `prompt_columns` returned.
    tokenizer : PreTrainedTokenizerBase
        A tokenizer with a chat template.

    Raises
    ------
    InvalidValue
        The record is not a conversation, or the chat template refuses it.
    """
    if isinstance(values[0], str):
        chat = [{"role": "user", "content": values[0]}]
    else:
        chat = _chat(values, columns)
    asked = chat[:-1] if chat and chat[-1]["role"] == "assistant" else chat
    return before_answer(asked, tokenizer)


def before_answer(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return messages as a model reads them before it answers.

    Raises
    ------
    InvalidValue
        The chat template refuses the messages.
    """
    return _template(chat, tokenizer, add_generation_prompt=True)


def last_answer(values: tuple[Any, ...], columns: list[str]) -> tuple[Chat, str] | None:
    """Return the last answer of a conversation, and the messages before it.

    Parameters
    ----------
    values : tuple
        A conversation, or a prompt and a response.
    columns : list[str]
        The columns that `chat_columns` returned.

    Returns
    -------
    tuple[list[dict[str, str]], str] or None
        The messages before the answer, and its text. Messages after it are left out. None if the
        conversation has no answer, or an empty one.

    Raises
    ------
    InvalidValue
        The record is not a conversation.
    """
    chat = _chat(values, columns)
    last = max((i for i, message in enumerate(chat) if message["role"] == "assistant"), default=-1)
    if last < 0 or not chat[last]["content"].strip():
        return None
    return chat[:last], chat[last]["content"]


def end_of_answers(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the special token that a chat template puts after an answer; none if it has none.

    Not every tokenizer names this token as the end of a text.
    """
    turns = (("user", "question"), ("assistant", "answer"))
    chat = [{"role": role, "content": content} for role, content in turns]
    _, found, tail = _template(chat, tokenizer).rpartition("answer")
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if found else []
    return tuple(ids[:1]) if ids and ids[0] in tokenizer.added_tokens_decoder else ()


def as_text(chat: Chat) -> str:
    """Return messages as lines that people read."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in chat)


def chat_tokens(
    rows: dict[str, list[Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    columns: list[str],
    limit: int,
) -> dict[str, list[Any]]:
    """Return the tokens of conversations, and which of them are answers.

    The chat template renders the messages before an answer, with its prompt for an answer; the
    answer is the text that follows this in the rendered conversation. A token that is only partly
    in an answer counts. Messages after the last answer are left out.

    Parameters
    ----------
    rows : dict[str, list]
        Columns of n records.
    tokenizer : PreTrainedTokenizerBase
        A tokenizer with a chat template.
    columns : list[str]
        The columns that `chat_columns` returned.
    limit : int
        Most tokens of a record; the rest is cut off.

    Returns
    -------
    dict[str, list]
        For each record: ``input_ids``, ``attention_mask``, ``labels`` (`IGNORED` outside answers)
        the number of ``answer_tokens``, and the number of ``tokens`` before the cut.

    Raises
    ------
    InvalidValue
        A record is not a conversation, the chat template refuses it, or the template renders
        earlier messages differently once an answer is added.
    """
    values = zip(*(rows[name] for name in columns), strict=True)
    rendered = [_rendered(_chat(value, columns), tokenizer) for value in values]
    tokens = tokenizer(
        [text for text, _ in rendered],
        add_special_tokens=False,  # They are in the template.
        return_offsets_mapping=True,
        verbose=False,
    )
    found: dict[str, list[Any]] = {
        "input_ids": [ids[:limit] for ids in tokens["input_ids"]],
        "attention_mask": [[1] * len(ids[:limit]) for ids in tokens["input_ids"]],
        "labels": [],
    }
    for ids, offsets, (_, answers) in zip(
        found["input_ids"], tokens["offset_mapping"], rendered, strict=True
    ):
        found["labels"].append(_labels(np.array(ids), np.array(offsets[:limit]), answers))
    found["tokens"] = [len(ids) for ids in tokens["input_ids"]]
    found["answer_tokens"] = [int((labels != IGNORED).sum()) for labels in found["labels"]]
    return found


def _chat(values: tuple[Any, ...], columns: list[str]) -> Chat:
    if len(values) == 2:
        roles = zip(("user", "assistant"), values, strict=True)
        return [{"role": role, "content": text or ""} for role, text in roles]
    try:
        chat = [(message["role"], message["content"] or "") for message in values[0]]
        if not all(isinstance(role, str) for role, _ in chat):
            raise TypeError("a role is not text")
        return [{"role": role, "content": content} for role, content in chat]
    except (TypeError, KeyError) as error:
        allowed = "a column of conversations, which are lists of {'role', 'content'}"
        raise InvalidValue("input-columns", ",".join(columns), allowed) from error


def _rendered(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation as text, and where answers begin and end in it (see `chat_tokens`)."""
    last = max((i for i, message in enumerate(chat) if message["role"] == "assistant"), default=-1)
    # Nothing is learned from what comes after the last answer.
    text = _template(chat[: last + 1] or chat, tokenizer)
    answers = []
    for i, message in enumerate(chat):
        if message["role"] == "assistant":
            before = _template(chat[:i], tokenizer, add_generation_prompt=True)
            through = text if i == last else _template(chat[: i + 1], tokenizer)
            if not (through.startswith(before) and text.startswith(through)):
                allowed = (
                    f"a model with a chat template that only adds text: it renders the {i} "
                    "messages before an answer differently once the answer is there, so the "
                    "answer's tokens cannot be found"
                )
                raise InvalidValue("model", tokenizer.name_or_path, allowed)
            answers.append((len(before), len(through)))
    # A model cannot read an empty text.
    return text or tokenizer.pad_token, answers


def _template(chat: Chat, tokenizer: PreTrainedTokenizerBase, **options: bool) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(chat, tokenize=False, **options)
    except (TemplateError, ValueError) as error:
        allowed = f"a model with a chat template that accepts these conversations ({error})"
        raise InvalidValue("model", tokenizer.name_or_path, allowed) from error
    return text


def _labels(
    ids: NDArray[np.int64], offsets: NDArray[np.int64], answers: list[tuple[int, int]]
) -> NDArray[np.int64]:
    """Return the tokens that are at least partly in an answer, and -100 for the others."""
    begins, ends = offsets.T
    chosen = np.zeros(len(ids), dtype=bool)
    for begin, end in answers:
        chosen |= (ends > begin) & (begins < end)
    chosen[0] = False  # No token comes before the first, so it cannot be predicted.
    return np.where(chosen, ids, IGNORED)
