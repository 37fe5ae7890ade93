"""Answers that a causal language model writes: always the likeliest token, one after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedlora_flwr.backbones.language_models import most_positions
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.tasks.evaluation import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]


def write_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    ends: Sequence[int] = (),
    *,
    most: int,
    batch_size: int,
) -> list[str]:
    """Return what a model writes after each prompt.

    The same model and prompts give the same answers, because nothing is drawn. What a checkpoint's
    own ``generation_config`` asks for, such as a penalty for repetition, is left out, so that
    figures of two checkpoints can be compared.

    Parameters
    ----------
    model : nn.Module
        A causal language model of transformers, or PEFT's model of one. It is in evaluation mode
        during the call.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer, with a token for padding.
    prompts : Sequence[str]
        The prompts with all special tokens, as a chat template renders them.
    ends : Sequence[int] (default: none)
        Tokens that end an answer, beside those that the checkpoint and the tokenizer name.
    most : int
        Most tokens of an answer.
    batch_size : int
        Prompts in a batch. A prompt that leaves the model less room than ``most`` is alone in its
        batch, so an answer does not depend on the others beside it.

    Returns
    -------
    list[str]
        The answers in the order of the prompts, without special tokens.

    Raises
    ------
    InvalidValue
        A prompt leaves the model no room for an answer.
    """
    # The adapted model's own hooks are for calls without a cache of keys and values.
    plain: Any = getattr(model, "get_base_model", lambda: model)()
    tokens = [_ids(text, tokenizer) for text in prompts]
    room = most_positions(plain)
    for place, ids in enumerate(tokens):
        if room is not None and len(ids) >= room:
            given = f"record {place} (counted from 0), with a prompt of {len(ids)} tokens"
            allowed = f"prompts of at most {room - 1} tokens, so that the model can answer"
            raise InvalidValue("data", given, allowed)
    stops = sorted({*_ends_of(plain.generation_config), *_ends_of(tokenizer), *ends})
    padding = tokenizer.pad_token_id
    said = [""] * len(tokens)
    with evaluating(model), _greedy(plain, stops, padding), torch.inference_mode():
        for part in _parts(tokens, most, room, batch_size):
            longest = max(len(tokens[place]) for place in part)
            fits = most if room is None else min(most, room - longest)
            inputs = _left_padded([tokens[place] for place in part], padding, plain.device)
            found = plain.generate(**inputs, max_new_tokens=fits)[:, longest:]
            for place, ids in zip(part, found.tolist(), strict=True):
                said[place] = tokenizer.decode(_until(ids, stops), skip_special_tokens=True)
    return said


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> Ids:
    found: Ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _parts(
    tokens: Sequence[Ids], most: int, room: int | None, batch_size: int
) -> Iterator[list[int]]:
    """Yield the places of prompts that share a batch, those of similar length together."""
    order = sorted(range(len(tokens)), key=lambda place: len(tokens[place]))
    free = [n for n in order if room is None or len(tokens[n]) + most <= room]
    for begin in range(0, len(free), batch_size):
        yield free[begin : begin + batch_size]
    yield from ([place] for place in order[len(free) :])


def _left_padded(rows: Sequence[Ids], padding: int, device: torch.device) -> dict[str, Tensor]:
    """Return prompts that all end at the last column, where the answers begin."""
    width = max(map(len, rows))
    ids = [[padding] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    named = {"input_ids": ids, "attention_mask": mask}
    return {name: torch.tensor(values, device=device) for name, values in named.items()}


@contextmanager
def _greedy(model: Any, stops: Sequence[int], padding: int) -> Iterator[None]:
    """Let a model take the likeliest token, and nothing that its checkpoint asks for beside it."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, use_cache=True, eos_token_id=[*stops] or None, pad_token_id=padding
    )
    try:
        yield
    finally:
        model.generation_config = own


def _ends_of(names_it: Any) -> set[int]:
    """Return the tokens that end a text by a tokenizer, or by a checkpoint's configuration."""
    found = getattr(names_it, "eos_token_id", None)
    return set() if found is None else {found} if isinstance(found, int) else {*found}


def _until(ids: Ids, stops: Sequence[int]) -> Ids:
    return ids[: next((place for place, one in enumerate(ids) if one in stops), len(ids))]
