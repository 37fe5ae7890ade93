"""Instruction tuning of causal language models on conversations."""

from __future__ import annotations

import logging
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora_flwr.backbones.language_models import (
    load_config,
)
from fedlora_flwr.data.arrow_records import ArrowRecords, pad_collate
from fedlora_flwr.data.prepared import prepare
from fedlora_flwr.data.records import Batch, Records
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.lora.exported import DRAWN
from fedlora_flwr.lora.wide_numbers import with_fp64
from fedlora_flwr.tasks.answers import Answer, asked_order
from fedlora_flwr.tasks.chats import (
    IGNORED,
    as_text,
    before_answer,
    chat_columns,
    chat_tokens,
    end_of_answers,
    last_answer,
    prompt_columns,
    prompt_of,
)
from fedlora_flwr.tasks.evaluation import measured
from fedlora_flwr.tasks.generation import write_answers
from fedlora_flwr.tasks.language_task import LanguageTask
from fedlora_flwr.tasks.tokens import check_ids, made_up_texts

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_LOGGER = logging.getLogger(__name__)
_KINDS = {True: "private", False: "public"}


class InstructionTuning(LanguageTask):
    """Learn the assistant's answers in conversations.

    The chat template of the model's tokenizer turns conversations into text. The loss is that of
    the answers' tokens, including the end marker that the template puts after an answer.
    ``input-columns`` names one column of conversations (lists of ``{"role", "content"}``), or two
    of text, the prompt and the response. Empty means ``messages`` if the data set has it, otherwise
    ``prompt,response``. Tokens beyond ``max-length`` are cut off. A record with all its answers cut
    off still counts as a record, and its gradient is zero. Records are not packed: each is a row of
    its own in a batch, because the gradient of a row is what is clipped.

    Batches are ``{"input_ids", "attention_mask", "labels": (n, t) int64, "answer_tokens": (n,)
    int64}``, padded to their longest record of t tokens; labels are -100 outside answers. The model
    returns logits of shape (n, t, vocabulary) for a batch. ``microbatch-size`` limits n in
    training and ``eval-batch-size`` limits it in evaluations.
    """

    name = "instruction-tuning"
    metric = "token_accuracy"
    head = ()
    _input_fields = ("role", "content")

    def build_model(self) -> nn.Module:
        """Return the checkpoint.

        Raises
        ------
        InvalidValue
            See `fedlora_flwr.backbones.language_models.build`; or the checkpoint lacks the layer
            that scores words, which an adapter cannot replace.
        """
        model: Any = super().build_model()
        if self._settings.weights != "random" and (drawn := getattr(model, DRAWN)):
            allowed = f"a language model with all weights, but those of {drawn[0]!r} are missing"
            raise InvalidValue("model", self._settings.model, allowed)
        # The cache of keys and values is useful for generation only.
        model.config.use_cache = False
        return model  # type: ignore[no-any-return]

    def skeleton(self, device: str = "meta") -> nn.Module:
        """Return the model without the checkpoint: random weights, or only shapes on ``"meta"``."""
        model: Any = super().skeleton(device)
        model.config.use_cache = False
        return model  # type: ignore[no-any-return]

    def save_model(self, model: nn.Module, folder: Path) -> None:
        """Write a plain model and its tokenizer; the model uses its cache, as its checkpoint does.

        Parameters are those of the base class.
        """
        plain: Any = model
        plain.config.use_cache = load_config(self._settings).use_cache
        super().save_model(plain, folder)

    def largest_batch(self, records: int) -> Batch:
        """Return conversations of ``max-length`` tokens, all of them answers."""
        shape = (records, self._settings.max_length)
        names = ("input_ids", "attention_mask", "labels")
        tokens = {name: torch.ones(shape, dtype=torch.int64) for name in names}
        return {**tokens, "answer_tokens": torch.full((records,), shape[1] - 1)}

    def made_up_batch(self, records: int) -> Batch:
        """Return random texts of up to ``max-length`` tokens, all of them answers."""
        names, shape = ["input_ids", "attention_mask"], (records, self._settings.max_length)
        texts = made_up_texts(self._tokenizer, self._config, names, shape)
        labels = texts["input_ids"].masked_fill(texts["attention_mask"] == 0, IGNORED)
        answers = (labels[:, 1:] != IGNORED).sum(dim=1)
        return {**texts, "labels": labels, "answer_tokens": answers}

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean negative log likelihood of each record's answer tokens, shape (n,).

        It is 0 for a record without answer tokens.
        """
        logits, labels, records = _predicted(model, batch)
        tokens = F.cross_entropy(logits, labels, reduction="none")
        sums = tokens.new_zeros(len(batch["labels"])).index_add(0, records, tokens)
        return sums / batch["answer_tokens"].clamp_min(1)

    def evaluate(self, model: nn.Module, records: Records) -> dict[str, float]:
        """Measure how well a model predicts each answer token from the right tokens before it.

        Parameters
        ----------
        model : nn.Module
            The model, in evaluation mode during the call. Batches are moved to its device.
        records : Records
            Records of this task.

        Returns
        -------
        dict[str, float]
            Over all answer tokens: ``loss``, the mean negative log likelihood in nats,
            ``token_accuracy``, the share of tokens to which the model gives the highest
            probability, and ``perplexity``, the exponential of ``loss``.

        Raises
        ------
        InvalidValue
            No record has an answer.
        """

        def measure(batch: Batch) -> Tensor:
            logits, labels, _ = _predicted(model, batch)
            losses = with_fp64(F.cross_entropy(logits, labels, reduction="none")).double()
            hits = with_fp64(logits.argmax(dim=1) == labels).double()
            return torch.stack((losses, hits, torch.ones_like(hits))).sum(dim=1, keepdim=True)

        size = self._settings.eval_batch_size
        loss, hits, tokens = measured(model, records, size, measure).sum(dim=1)
        if not tokens:
            raise InvalidValue("records", len(records), "records with answers to evaluate on")
        return {
            "loss": (loss / tokens).item(),
            "token_accuracy": (hits / tokens).item(),
            "perplexity": (loss / tokens).exp().item(),
        }

    def predictions(self, model: nn.Module, dataset: Dataset) -> dict[str, list[str]]:
        """Return the model's answer to each conversation: the likeliest token, one after another.

        A conversation ends before its last answer, if it ends with one. An answer has at most
        ``max-new-tokens`` tokens.

        Raises
        ------
        InvalidValue
            A column is missing, or the chat template refuses a conversation.
        """
        columns = prompt_columns(dataset, self._settings.input_columns)
        rows = zip(*(dataset[name][:] for name in columns), strict=True)
        prompts = [prompt_of(values, columns, self._tokenizer) for values in rows]
        return {"answer": self._write(model, prompts)}

    def answers(self, model: nn.Module) -> list[Answer]:
        """Return the model's answers to some public conversations.

        A conversation ends before its last answer, which is the right one. Those without an answer,
        those whose answer begins beyond ``max-length``, and those that are private, too, are not
        asked.

        Parameters
        ----------
        model : nn.Module
            The model, in evaluation mode during the call.

        Returns
        -------
        list[Answer]
            At most ``generation-limit`` answers, to the same records in each call.

        Raises
        ------
        InvalidValue
            No public conversation can be asked, or the chat template refuses one.
        """
        said = self._write(model, [prompt for prompt, _, _ in self._asked])
        asked = zip(self._asked, said, strict=True)
        return [Answer(text, (right,), answer) for (_, text, right), answer in asked]

    @cached_property
    def _asked(self) -> list[tuple[str, str, str]]:
        """For each conversation that is asked: prompt, the same for people, right answer."""
        settings, tokenizer, found = self._settings, self._tokenizer, []
        columns, private = self._input_columns(self._test), self._also_private()
        for place in asked_order(len(self._test)).tolist():
            row = self._test[place]
            split = last_answer(tuple(row[name] for name in columns), columns)
            if split is None or place in private:
                continue
            prompt = before_answer(split[0], tokenizer)
            tokens = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
            if len(tokens) < settings.max_length:
                found.append((prompt, as_text(split[0]), split[1]))
            if len(found) == settings.generation_limit:
                break
        if not found:
            allowed = (
                f"0, or a larger max-length or another test-split: no public record that is not "
                f"private has an answer within max-length = {settings.max_length} tokens"
            )
            raise InvalidValue("generation-limit", settings.generation_limit, allowed)
        return found

    def _write(self, model: nn.Module, prompts: list[str]) -> list[str]:
        settings, tokenizer = self._settings, self._tokenizer
        return write_answers(
            model,
            tokenizer,
            prompts,
            end_of_answers(tokenizer),
            most=settings.max_new_tokens,
            batch_size=settings.eval_batch_size,
        )

    @property
    def _auto(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    @cached_property
    def _config(self) -> PretrainedConfig:
        return load_config(self._settings)

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            allowed = (
                f"a model whose tokenizer has a chat template, which task = {self.name!r} needs. "
                "Take the chat or instruct version of the model, or set tokenizer.chat_template "
                "and save model and tokenizer into a folder with save_pretrained"
            )
            raise InvalidValue("model", self._settings.model, allowed)

    def _input_columns(self, dataset: Dataset) -> list[str]:
        return chat_columns(dataset, self._settings.input_columns)

    def _prepare(self, dataset: Dataset, *, training: bool) -> ArrowRecords:
        settings, tokenizer = self._settings, self._tokenizer
        columns, limit = self._input_columns(dataset), settings.max_length
        prepared = prepare(
            dataset,
            partial(chat_tokens, tokenizer=tokenizer, columns=columns, limit=limit),
            {
                "tokenizer": self._tokenizer_text,
                "template": [tokenizer.chat_template, tokenizer.special_tokens_map],
                "columns": columns,
                "limit": limit,
            },
            ["input_ids", "attention_mask", "labels", "answer_tokens", "tokens"],
            packages=["tokenizers", "transformers"],
        )
        check_ids(prepared, self._config)
        _warn_of_cuts(prepared["tokens"][:], limit, training=training)
        # A causal model never reads beyond a record's last token, so any padding will do.
        records = ArrowRecords(prepared.remove_columns("tokens"), pad_collate(limit=limit))
        split = settings.train_split if training else settings.test_split
        _check_answers(records, split, settings.max_length, training=training)
        return records


def _warn_of_cuts(tokens: list[int], limit: int, *, training: bool) -> None:
    """Say how many records are cut. What is cut off does not become another record."""
    if cut := sum(count > limit for count in tokens):
        _LOGGER.warning(
            "%d of %d %s records are longer than max-length = %d tokens. The rest of each is cut "
            "off.",
            cut,
            len(tokens),
            _KINDS[training],
            limit,
        )


def _check_answers(records: ArrowRecords, split: str, limit: int, *, training: bool) -> None:
    """Refuse public records if none has an answer. Private ones without an answer are accepted.

    They train as records with a zero gradient. The run chooses the length, so an error about
    private records would tell the server where their answers begin.
    """
    without = int((records.values("answer_tokens") == 0).sum())
    if without == len(records) and not training:
        allowed = f"more tokens, as no record of split {split!r} has an answer within these"
        raise InvalidValue("max-length", limit, allowed)
    if without:
        _LOGGER.warning(
            "%d of %d %s records have no answer within max-length = %d tokens.",
            without,
            len(records),
            _KINDS[training],
            limit,
        )


def _predicted(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits of the m answer tokens of a batch, their labels, and the record of each.

    Only these logits, (m, vocabulary), are copied and made fp32.
    """
    found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    following = batch["labels"][:, 1:]
    if following.is_meta:
        # Memory is being counted, so all tokens are taken for answer tokens.
        sizes = (torch.arange(size, device=following.device) for size in following.shape)
        records, positions = torch.cartesian_prod(*sizes).T
    else:
        records, positions = (following != IGNORED).nonzero(as_tuple=True)
    logits: Tensor = found.logits[records, positions].float()
    return logits, following[records, positions], records
