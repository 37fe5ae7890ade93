"""The common part of all tasks on a language model: model, tokenizer and made-up texts."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedlora_flwr.backbones.language_models import (
    build,
    check_length,
    head_modules,
    input_names,
    load_tokenizer,
    save,
    skeleton,
)
from fedlora_flwr.tasks.dataset_task import DatasetTask
from fedlora_flwr.tasks.tokens import made_up_texts

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class LanguageTask(DatasetTask):
    """A task on a transformers model and its tokenizer.

    A subclass names the class of transformers that builds its model (`_auto`) and the model's
    configuration (`_config`), and adds what a record has beside its tokens.
    """

    lora_targets = ""

    @cached_property
    def head(self) -> tuple[str, ...]:
        """The layers that are not in the backbone. They start from random weights."""
        return head_modules(self.skeleton())

    def skeleton(self, device: str = "meta") -> nn.Module:
        """Return the model without the checkpoint: random weights, or only shapes on ``"meta"``."""
        model = skeleton(self._auto, self._config, device)
        check_length(self._settings.max_length, model)
        return model

    def build_model(self) -> nn.Module:
        """Return the checkpoint; a head that it lacks is drawn from the seed.

        Raises
        ------
        InvalidValue
            See `fedlora_flwr.backbones.language_models.build`.
        """
        return build(self._auto, self._settings, self._config, self._settings.seed)

    def save_model(self, model: nn.Module, folder: Path) -> None:
        """Write a plain model with its tokenizer, as transformers' ``from_pretrained`` reads them.

        Parameters
        ----------
        model : nn.Module
            The model of `build_model`, with other weights.
        folder : Path
            The folder; it is made if missing.
        """
        save(model, self._tokenizer, folder)

    @property
    def _auto(self) -> Any:
        """The class of transformers that builds the model."""
        raise NotImplementedError

    @cached_property
    def _config(self) -> PretrainedConfig:
        raise NotImplementedError

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(self._settings)
        self._check_tokenizer(tokenizer)
        return tokenizer

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer that the task cannot use. The default accepts every tokenizer."""

    @cached_property
    def _tokenizer_text(self) -> str:
        """The tokenizer's state, taken before a call changes its truncation."""
        text: str = self._tokenizer.backend_tokenizer.to_str()
        return text

    @cached_property
    def _inputs(self) -> list[str]:
        """Names of the fields that the model reads."""
        return input_names(self._tokenizer, self._config)

    def _largest_inputs(self, records: int) -> dict[str, Tensor]:
        """Return inputs of ``max-length`` tokens, each of shape (records, max-length)."""
        shape = (records, self._settings.max_length)
        return {name: torch.ones(shape, dtype=torch.int64) for name in self._inputs}

    def _made_up_inputs(self, records: int, *, pair: bool = False) -> dict[str, Tensor]:
        """Return random texts, or pairs of them if ``pair``, of up to ``max-length`` tokens."""
        shape = (records, self._settings.max_length)
        return dict(made_up_texts(self._tokenizer, self._config, self._inputs, shape, pair=pair))
