"""Checks that a model can read all tokens, and made-up texts of its tokens."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from fedlora_flwr.data.records import Batch
from fedlora_flwr.errors import InvalidValue

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_SEED = 0


def check_ids(prepared: Dataset, config: PretrainedConfig) -> None:
    """Refuse records with tokens that a model has no embedding for.

    Parameters
    ----------
    prepared : Dataset
        Records with the column ``input_ids``.
    config : PretrainedConfig
        The model's configuration.

    Raises
    ------
    InvalidValue
        A token is beyond the model's embeddings.
    """
    import pyarrow.compute as pc

    known = _embeddings(config)
    if known is None:
        return
    chunks = prepared.data.table.column("input_ids").chunks
    largest = max((pc.max(_flat(chunk)).as_py() or 0 for chunk in chunks), default=0)
    if largest >= known:
        raise _beyond(config, f"records have token {largest}", known)


def _flat(values: pa.Array) -> pa.Array:
    while hasattr(values.type, "value_type"):  # A question has a list for each of its windows.
        values = values.flatten()
    return values


def made_up_texts(
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    names: list[str],
    shape: tuple[int, int],
    *,
    pair: bool = False,
) -> Batch:
    """Return texts of random words as a model's inputs.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer, which is not changed.
    config : PretrainedConfig
        The model's configuration.
    names : list[str]
        The inputs that `fedlora_flwr.backbones.language_models.input_names` returned.
    shape : tuple[int, int]
        Number of texts, and the most tokens of each.
    pair : bool (default: False)
        Whether a text is a pair of texts.

    Returns
    -------
    Batch
        int64 tensors of shape (n, t).

    Raises
    ------
    InvalidValue
        The tokenizer has words that the model has no embedding for.
    """
    count, length = shape
    others = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    words = sorted({*tokenizer.get_vocab().values()} - others)
    known = _embeddings(config)
    if known is not None and words and words[-1] >= known:
        raise _beyond(config, f"the tokenizer has token {words[-1]}", known)
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randint(max(len(words), 1), (2, count, length), generator=generator).tolist()
    own = copy.deepcopy(tokenizer)  # A call changes the truncation that a tokenizer keeps.
    texts = [[own.decode([words[i] for i in text]) for text in part] for part in drawn]
    found = own(
        *texts[: 1 + pair],
        truncation=True,
        max_length=length,
        padding=True,
        return_token_type_ids=True,
        return_attention_mask=True,
        return_tensors="pt",
        verbose=False,
    )
    return {name: found[name].long() for name in names}


def _embeddings(config: PretrainedConfig) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


def _beyond(config: PretrainedConfig, found: str, known: int) -> InvalidValue:
    allowed = (
        f"a model with its own tokenizer: {found}, but the model has embeddings for tokens 0 to "
        f"{known - 1} only. Save the model after model.resize_token_embeddings, or use its own "
        "tokenizer"
    )
    return InvalidValue("model", config.name_or_path, allowed)
