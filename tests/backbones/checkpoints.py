"""Tiny checkpoints with random weights, and tokenizers trained on a handful of words."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, WordPiece
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)
from transformers.utils import logging

logging.disable_progress_bar()

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>"
    "{{ message.content + '<|end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
_ROBERTA_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]
_CHAT_TOKENS = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
_SHAPE = {"num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}


def bert(folder: Path, texts: Iterable[str], positions: int = 64) -> Path:
    """Save a WordPiece tokenizer and a BERT without a head."""
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=1000, special_tokens=_BERT_TOKENS, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=positions,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    config = BertConfig(
        vocab_size=len(fast), hidden_size=32, max_position_embeddings=positions, **_SHAPE
    )
    return _saved(folder, fast, lambda: BertModel(config))


def roberta(folder: Path, texts: Iterable[str], positions: int = 64) -> Path:
    """Save a byte-level BPE tokenizer and a RoBERTa without a head."""
    tokenizer = _byte_level(texts, _ROBERTA_TOKENS)
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), add_prefix_space=False
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        model_max_length=positions,
        model_input_names=["input_ids", "attention_mask"],
    )
    config = RobertaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        max_position_embeddings=positions + 2,
        type_vocab_size=1,
        pad_token_id=1,
        **_SHAPE,
    )
    return _saved(folder, fast, lambda: RobertaModel(config))


def llama(folder: Path, texts: Iterable[str], template: str | None = CHAT_TEMPLATE) -> Path:
    """Save a byte-level BPE tokenizer with a chat template and a LLaMA."""
    fast = _chat_tokenizer(texts, template)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        **_SHAPE,
    )
    return _saved(folder, fast, lambda: LlamaForCausalLM(config))


def gpt2(folder: Path, texts: Iterable[str], template: str | None = CHAT_TEMPLATE) -> Path:
    """Save a byte-level BPE tokenizer, which names token types, and a GPT-2."""
    fast = _chat_tokenizer(texts, template, ["input_ids", "token_type_ids", "attention_mask"])
    config = GPT2Config(
        vocab_size=len(fast),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=256,
        initializer_range=0.3,
    )
    return _saved(folder, fast, lambda: GPT2LMHeadModel(config))


def write_split(folder: Path, split: str, rows: Sequence[Any]) -> None:
    """Write records as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def _chat_tokenizer(
    texts: Iterable[str], template: str | None, inputs: Sequence[str] = ("input_ids",)
) -> PreTrainedTokenizerFast:
    tokenizer = _byte_level(texts, _CHAT_TOKENS)
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, begin])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=256,
        model_input_names=[*inputs],
    )
    fast.chat_template = template
    return fast


def _byte_level(texts: Iterable[str], special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _saved(folder: Path, tokenizer: PreTrainedTokenizerFast, build: Callable[[], Any]) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        build().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
