"""A model that every benchmark measures in a moment."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn

from benchmarks.step import (
    Shape,
    roberta,
    token_batch,
)


def small_roberta() -> Shape:
    def build() -> nn.Module:
        from transformers import RobertaConfig, RobertaForSequenceClassification

        config = RobertaConfig(
            vocab_size=60,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=40,
            num_labels=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model: nn.Module = RobertaForSequenceClassification(config)
        return model

    batch = partial(token_batch, tokens=9, vocabulary=60)
    return replace(roberta(), build=build, batch=batch)
