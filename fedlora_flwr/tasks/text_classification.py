"""Sequence classification: SST-2, QNLI, QQP, MNLI, SNLI and the like, on any transformers model."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedlora_flwr.backbones.language_models import (
    MeanPooled,
    load_config,
)
from fedlora_flwr.backbones.sentence_encoders import is_read_by_mean
from fedlora_flwr.data.arrow_records import ArrowRecords, pad_collate
from fedlora_flwr.data.names import names
from fedlora_flwr.data.prepared import prepare
from fedlora_flwr.data.records import Batch
from fedlora_flwr.errors import InvalidValue, unknown
from fedlora_flwr.tasks.classifier_task import ClassifierTask
from fedlora_flwr.tasks.language_task import LanguageTask
from fedlora_flwr.tasks.tokens import check_ids

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


# Names of columns that number or name records and hold no text to learn from. The first is pandas'
# name for the index of a table in a parquet file. `input-columns` can still name such a column.
_INDEX = re.compile(r"__index_level_\d+__|(\w+[_-])?(id|idx|uid|guid|uuid)|index", re.IGNORECASE)


class TextClassification(ClassifierTask, LanguageTask):
    """Classify a text, or a pair of texts.

    Batches are ``{"input_ids", "attention_mask", …: (n, t) int64, "label": (n,) int64}``, padded to
    their longest record of t tokens. Keys of the configuration: ``model``, ``dataset``,
    ``input-columns`` (one or two columns of text; empty takes all), ``label-column``,
    ``max-length``.
    """

    name = "text-classification"

    def largest_batch(self, records: int) -> Batch:
        """Return texts of ``max-length`` tokens."""
        return {**self._largest_inputs(records), "label": torch.zeros(records, dtype=torch.int64)}

    def made_up_batch(self, records: int) -> Batch:
        """Return random texts of up to ``max-length`` tokens, all of the first class."""
        return {**self._made_up_inputs(records), "label": torch.zeros(records, dtype=torch.int64)}

    def model_notes(self) -> list[str]:
        """Return a sentence where the checkpoint was trained to be read in another way."""
        settings = self._settings
        if settings.pooling == "mean" or not is_read_by_mean(settings.model):
            return []
        return [
            f"{settings.model} is a sentence encoder that was trained to be read by the mean of "
            "its tokens, as its checkpoint says. Set pooling = 'mean': pooling = 'model' reads its "
            "first token alone, which usually costs accuracy."
        ]

    def save_model(self, model: nn.Module, folder: Path) -> None:
        """Write a plain model with its tokenizer and the names of its classes.

        Parameters are those of `LanguageTask.save_model`.
        """
        config: Any = model.config
        config.id2label = dict(enumerate(self.class_names()))
        config.label2id = {name: number for number, name in config.id2label.items()}
        super().save_model(model, folder)

    @property
    def _auto(self) -> Any:
        if self._settings.pooling == "mean":
            return MeanPooled
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    @cached_property
    def _config(self) -> PretrainedConfig:
        config = load_config(self._settings, num_labels=self.num_classes)
        # Models that classify the last token use the padding to find it.
        config.pad_token_id = self._tokenizer.pad_token_id
        return config

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(**{name: batch[name] for name in self._inputs}).logits
        return logits.float()

    def _input_columns(self, dataset: Dataset) -> list[str]:
        settings = self._settings
        others = (settings.label_column, settings.partition_column, settings.user_column)
        return text_columns(dataset, settings.input_columns, others)

    def _columns_of(self, dataset: Dataset, split: str) -> list[str]:
        """Return the columns to read. Those of a test split are in the private split's order."""
        own = self._input_columns(dataset)
        private = None if split == self._settings.train_split else self._private_source()
        if private is None:
            return own
        known = self._input_columns(private)
        if set(known) != set(own):
            raise self._other_columns(split, own, known)
        return known

    def _prepare(self, dataset: Dataset, *, training: bool) -> ArrowRecords:
        settings = self._settings
        split = settings.train_split if training else settings.test_split
        prepared = self._tokenized(dataset, self._columns_of(dataset, split))
        return self._records(self._with_classes(prepared, dataset, training=training))

    def _unlabeled(self, dataset: Dataset) -> ArrowRecords:
        return self._records(self._tokenized(dataset, self._input_columns(dataset)))

    def _tokenized(self, dataset: Dataset, columns: list[str]) -> Dataset:
        settings, tokenizer = self._settings, self._tokenizer
        prepared = prepare(
            dataset,
            partial(_tokens, tokenizer=tokenizer, columns=columns, limit=settings.max_length),
            {"tokenizer": self._tokenizer_text, "columns": columns, "limit": settings.max_length},
            self._inputs,
            packages=["tokenizers", "transformers"],
        )
        check_ids(prepared, self._config)
        return prepared

    def _records(self, prepared: Dataset) -> ArrowRecords:
        padding = {"input_ids": int(self._tokenizer.pad_token_id)}
        return ArrowRecords(prepared, pad_collate(padding, limit=self._settings.max_length))


def text_columns(dataset: Dataset, chosen: str, others: Collection[str]) -> list[str]:
    """Return the one or two columns to read.

    Parameters
    ----------
    dataset : Dataset
        The split.
    chosen : str
        Names with commas between them. Empty for all text columns except ``others`` and columns
        that name records, such as ``id``.
    others : Collection[str]
        Columns with another purpose, such as the class.

    Raises
    ------
    InvalidValue
        A column is missing or holds no text, or there are none or more than two.
    """
    texts = [
        name
        for name, feature in dataset.features.items()
        if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    found = list(names(chosen)) or [
        name for name in texts if name not in others and not _INDEX.fullmatch(name)
    ]
    for name in found:
        if name not in texts:
            kind = dataset.features.get(name)
            held = f", but {name!r} holds {kind}, which is not text" if kind is not None else ""
            raise unknown("input-columns", name, texts, after=held)
    if not 1 <= len(found) <= 2:
        raise InvalidValue("input-columns", chosen, f"one or two of {texts}")
    return found


def _tokens(
    rows: dict[str, list[Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    columns: list[str],
    limit: int,
) -> dict[str, Any]:
    texts = [[text or "" for text in rows[name]] for name in columns]
    found: dict[str, Any] = tokenizer(
        *texts,
        truncation=True,
        max_length=limit,
        return_attention_mask=True,
        return_token_type_ids=True,
        verbose=False,
    ).data
    fillings = {"input_ids": tokenizer.pad_token_id, "attention_mask": 1, "token_type_ids": 0}
    for name, filling in fillings.items():
        # A tokenizer that adds no special tokens returns none for an empty text.
        found[name] = [values or [filling] for values in found[name]]
    return found
