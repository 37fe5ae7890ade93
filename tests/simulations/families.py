"""Configurations of tiny models of many families, with a tokenizer that they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from tests.backbones import checkpoints
from tests.tasks.tiny_tasks import WORDS

_BERT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 80,
}  # fmt: skip
_LLAMA = {**_BERT, "num_key_value_heads": 1}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
_DEBERTA = {**_BERT, "relative_attention": True, "pos_att_type": "p2c|c2p"}

SETTINGS: dict[str, dict[str, Any]] = {
    "Albert": {**_BERT, "embedding_size": 8},
    "Bert": _BERT,
    "BigBird": _BERT,
    "Bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "Camembert": _BERT,
    "Deberta": _DEBERTA,
    "DebertaV2": {**_DEBERTA, "share_att_key": True, "position_buckets": 16},
    "DistilBert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "Electra": {**_BERT, "embedding_size": 8},
    "Falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 80},
    "GPTNeoX": _BERT,
    "Gemma2": {**_LLAMA, "head_dim": 8},
    "Llama": _LLAMA,
    "Mamba": {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    "MobileBert": {**_BERT, "embedding_size": 8, "intra_bottleneck_size": 8},
    "ModernBert": {**_BERT, "cls_token_id": 2, "sep_token_id": 3},
    "MPNet": _BERT,
    "Mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 80},
    "OPT": {**_BERT, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "Olmo2": _LLAMA,
    "Phi": _BERT,
    "Phi3": _LLAMA,
    "Qwen2": _LLAMA,
    "Roberta": _BERT,
    "T5": {**_T5, "decoder_start_token_id": 0},
    "XLNet": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32},
}
_TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content + ' [SEP]' }} {% endfor %}"


def tokenizer(folder: Path) -> Any:
    """Return a tokenizer of words, with a chat template."""
    checkpoints.bert(folder, [" ".join(WORDS)] * 3)
    found: Any = transformers.AutoTokenizer.from_pretrained(folder)
    found.chat_template = _TEMPLATE
    return found


def save(family: str, folder: Path, words: Any, **changes: Any) -> Path:
    """Write a model's configuration and tokenizer; nothing that is planned needs weights."""
    ids = {"vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    made = getattr(transformers, f"{family}Config")(**{**ids, **SETTINGS[family], **changes})
    made.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
