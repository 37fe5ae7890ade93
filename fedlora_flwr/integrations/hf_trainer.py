"""The private step inside a Hugging Face `Trainer`, for one model and without Flower.

The Trainer keeps its loop, callbacks, schedule, logging and saving. This module takes over all that
touches private records: which ones join a batch, the loss of each record, clipping, noise and the
optimizer's step. Settings that would break the guarantee are corrected here or refused by name.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from fedlora_flwr.errors import InvalidValue, PrivacyViolation
from fedlora_flwr.integrations.trainer_arguments import check_arguments, check_trainer
from fedlora_flwr.lora.adapters import AdaptedModel
from fedlora_flwr.privacy.budget import Segment, calibrate, check_budget
from fedlora_flwr.privacy.clip_weights import EVEN, ClipWeights
from fedlora_flwr.privacy.engine import LossFunction, OptimizerSettings, PrivateEngine
from fedlora_flwr.privacy.ledger import LEDGER, Account, Ledger, LedgerSummary
from fedlora_flwr.privacy.masks import own_randomness
from fedlora_flwr.privacy.mechanism import Mechanism, poisson_batches
from fedlora_flwr.privacy.noise import SecureNoise, SeededNoise

_PRIVATE_FIGURES = ("loss", "grad_norm", "train_loss")


class PrivateTrainer(Trainer):  # type: ignore[misc]
    """A Hugging Face `Trainer` whose training steps are differentially private.

    The model is a `peft.PeftModel` with LoRA adapters, and a head in ``modules_to_save`` if it
    trains. Each record joins a step with probability b/n. Its gradient is clipped over all trained
    tensors together to ``args.max_grad_norm``. Then noise is added, and the optimizer that the
    arguments name steps. σ is calibrated for ``max_steps``, or for all epochs, so that the whole
    training spends at most ``epsilon``. All planned steps are written to a ledger before the first
    one: a run that stops early reports too much, never too little.

    Parameters
    ----------
    model : PeftModel
        The model.
    args : TrainingArguments
        As for `transformers.Trainer`. ``per_device_train_batch_size`` is the expected batch size b,
        ``max_grad_norm`` is the clip norm C of one record, and ``label_smoothing_factor`` smooths
        the loss of each record.
    **kwargs
        The other arguments of `transformers.Trainer`.
    epsilon, delta : float
        The budget of each record. Neighboring data sets replace one record's gradient by zero.
    losses : callable, optional
        Maps (model, batch) to one loss per record, shape (n,). By default the cross entropy of
        ``labels``: that of a record's class, or the mean over its tokens, which are shifted by one
        for models that predict the next token.
    microbatch_size : int, optional
        Records in one forward pass; all by default.
    ledger : str or Path, optional
        SQLite file of the spent budget; ``ledger.sqlite`` in ``args.output_dir`` by default.
    secure_noise : bool (default: False)
        Draw noise from the operating system's cryptographic generator.
    clip_weights : ClipWeights
        What the gradients of A, B and the head are multiplied by before the clip, and divided by
        after the noise; by default 1. It costs no budget.
    eval_is_public : bool (default: False)
        State that the records you evaluate and predict on are public. Their figures are not
        protected.

    Raises
    ------
    InvalidValue
        A setting would break the guarantee, or the budget promises nothing for this data set.
    PrivacyViolation
        A part of the model would escape clipping (see `AdaptedModel`).

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from peft import LoraConfig, get_peft_model
    >>> from transformers import RobertaConfig, RobertaForSequenceClassification, TrainingArguments
    >>> sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    >>> net = RobertaForSequenceClassification(RobertaConfig(num_attention_heads=1, **sizes))
    >>> model = get_peft_model(net, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    >>> rows = [{"input_ids": [3, 4], "labels": 0}, {"input_ids": [5, 6], "labels": 1}] * 10
    >>> with TemporaryDirectory() as folder:
    ...     args = TrainingArguments(folder, max_steps=2, report_to="none", use_cpu=True)
    ...     trainer = PrivateTrainer(model, args, train_dataset=rows, epsilon=8.0, delta=1e-2)
    ...     output = trainer.train()  # doctest: +ELLIPSIS
    {'train_runtime': ..., 'epsilon': '7.995', 'delta': '0.01', ...}
    """

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        epsilon: float,
        delta: float,
        losses: LossFunction | None = None,
        microbatch_size: int | None = None,
        ledger: str | Path | None = None,
        secure_noise: bool = False,
        clip_weights: ClipWeights = EVEN,
        eval_is_public: bool = False,
        **kwargs: Any,
    ) -> None:
        check_trainer(type(self), kwargs)
        check_arguments(args)
        if not hasattr(model, "peft_config"):
            allowed = "a peft.PeftModel: get_peft_model(model, LoraConfig(...))"
            raise InvalidValue("model", type(model).__name__, allowed)
        super().__init__(model, args, **kwargs)
        if not isinstance(self.train_dataset, Sized) or not hasattr(
            self.train_dataset, "__getitem__"
        ):
            kind = type(self.train_dataset).__name__
            raise InvalidValue("train_dataset", kind, "a data set with a length and positions")
        self._eval_is_public = eval_is_public
        if self.eval_dataset is not None:
            self._check_public(self.eval_dataset)
        size = int(self.args.train_batch_size)
        check_budget(epsilon, delta, size, len(self.train_dataset))
        self._epsilon, self._delta, self._weights = epsilon, delta, clip_weights
        self._noise = SecureNoise() if secure_noise else SeededNoise(None)
        self._ledger_path = Path(ledger or Path(self.args.output_dir) / LEDGER)
        self._run = uuid4().hex
        self.privacy: LedgerSummary | None = None
        """What the planned training spends. None before `create_optimizer` plans it."""
        self.mechanism: Mechanism | None = None
        """How gradients are clipped and noised. None before `create_optimizer` plans training."""
        self._left = 0
        smoothing = float(self.args.label_smoothing_factor)
        self._engine = PrivateEngine(
            AdaptedModel(self.model), losses or _losses(smoothing), microbatch_size
        )
        collator = _in_steps(self.data_collator, model)
        collate = self._get_collator_with_removed_columns(collator, "training")
        self._records = _CollatedRecords(self.train_dataset, collate)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, and return what `transformers.Trainer` returns, without the training loss.

        ``metrics`` has ``epsilon`` and ``delta``.

        Raises
        ------
        InvalidValue
            ``resume_from_checkpoint`` is given.
        BudgetExhausted
            This trainer has already trained.
        """
        if resume_from_checkpoint:
            raise InvalidValue(
                "resume_from_checkpoint",
                resume_from_checkpoint,
                "None: all planned steps are in the ledger already, and steps after the checkpoint "
                "would be taken twice",
            )
        output = super().train(None, *args, **kwargs)
        return output._replace(training_loss=math.nan)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a loader of Poisson samples. Each is the positions of its records, maybe none."""
        size, count = int(self.args.train_batch_size), len(self._records)
        plan = Mechanism(0.0, 1.0, size, count)
        return DataLoader(_PoissonBatches(plan), batch_size=None)

    def create_optimizer(self, model: Any = None) -> Any:
        """Calibrate σ to the planned steps, write them to the ledger, and make the optimizer."""
        steps, size = self._planned_steps(), int(self.args.train_batch_size)
        rate = size / len(self._records)
        sigma = calibrate(self._epsilon, self._delta, rate, steps)
        norm, count = float(self.args.max_grad_norm), len(self._records)
        self.mechanism = Mechanism(sigma, norm, size, count, weights=self._weights)
        account = Account("train_dataset", self._run, self._epsilon, self._delta)
        plan = Segment(sigma, rate, steps)
        self.privacy = Ledger(self._ledger_path).record(account, 0, plan, plan)
        self._left = steps
        kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
            self.args, self.model
        )
        settings = _TrainersOptimizer.of(kind, options, self.args)
        self._engine.start_round(self.mechanism, settings, self._noise)
        self.optimizer = settings.made[0]
        return self.optimizer

    def training_step(self, model: Any, inputs: Mapping[str, Tensor], *_: Any) -> Tensor:
        """Take one private step, including the optimizer's. Return 0, since the loss is private.

        The Trainer's own ``optimizer.step()`` then finds no gradients and changes nothing.
        """
        if self._left < 1:
            raise PrivacyViolation("The Trainer asked for more steps than the noise is made for.")
        self._left -= 1
        # Dropout needs a secret seed: the Trainer's own is usually its public default, 42.
        with own_randomness(None):
            self._engine.step(
                self._records, inputs["positions"], tuple(self._engine.adapted.parameters)
            )
        return torch.zeros((), device=self.args.device)

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Return the number of records behind a loader."""
        if isinstance(dataloader.dataset, _PoissonBatches):
            return len(self._records)
        return super().num_examples(dataloader)  # type: ignore[no-any-return]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log without the figures of private records, and add the spent ε and δ."""
        if "train_loss" in logs and self.privacy is not None:
            logs["epsilon"], logs["delta"] = self.privacy.epsilon, self.privacy.delta
        for name in _PRIVATE_FIGURES:
            logs.pop(name, None)
        super().log(logs, *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return a loader of public records.

        Raises
        ------
        InvalidValue
            ``eval_is_public`` does not state that they are public.
        """
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        self._check_public(chosen)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return a loader of public records, as `get_eval_dataloader` does."""
        self._check_public(test_dataset)
        return super().get_test_dataloader(test_dataset)

    def _planned_steps(self) -> int:
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        epochs: float = self.args.num_train_epochs
        return math.ceil(epochs * len(self.get_train_dataloader()))

    def _check_public(self, dataset: Any) -> None:
        if dataset is self.train_dataset or not self._eval_is_public:
            raise InvalidValue(
                "eval_dataset",
                type(dataset).__name__,
                "public records, and eval_is_public = True to say so: figures on private records "
                "are not protected",
            )


class _PoissonBatches(IterableDataset[dict[str, Tensor]]):
    """One Poisson sample for each step of an epoch, drawn again in every epoch."""

    def __init__(self, mechanism: Mechanism) -> None:
        self._mechanism = mechanism

    def __len__(self) -> int:
        return math.ceil(self._mechanism.num_records / self._mechanism.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for positions in poisson_batches(self._mechanism, len(self), None):
            yield {"positions": positions}


class _CollatedRecords:
    """A data set and its collator, in the form in which the engine reads records."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Mapping[str, Tensor]]) -> None:
        self._dataset, self._collate = dataset, collate

    def __len__(self) -> int:
        return len(self._dataset)

    def batch(self, indices: Tensor) -> Mapping[str, Tensor]:
        return self._collate([self._dataset[position] for position in indices.tolist()])


@dataclass(frozen=True)
class _TrainersOptimizer(OptimizerSettings):
    """Makes the optimizer that the Trainer's arguments name, over the engine's groups."""

    kind: type[torch.optim.Optimizer] = torch.optim.SGD
    options: Mapping[str, Any] = field(default_factory=dict)
    made: list[torch.optim.Optimizer] = field(default_factory=list)

    @classmethod
    def of(cls, kind: Any, options: Mapping[str, Any], args: Any) -> _TrainersOptimizer:
        rate, decay = float(args.learning_rate), float(args.weight_decay)
        # Fused kernels change a parameter without raising its version, by which the engine notices
        # a step.
        plain = {name: value for name, value in options.items() if name != "fused"}
        name = kind.__name__
        return cls(name, rate, rate, rate, weight_decay=decay, kind=kind, options=plain)

    def build(self, groups: Sequence[dict[str, object]]) -> torch.optim.Optimizer:
        decayed = [{**group, "weight_decay": self.weight_decay} for group in groups]
        self.made.append(self.kind(decayed, **self.options))
        return self.made[0]


def _in_steps(collator: Any, model: Any) -> Any:
    """Let a collator pad to multiples of 8, as records of different widths never share a pass."""
    config = getattr(model.get_base_model(), "config", None)
    longest = getattr(config, "max_position_embeddings", None)
    # RoBERTa's 514 positions are two more than the tokens that it reads.
    fits = longest in (None, 514) or longest % 8 == 0
    if getattr(collator, "pad_to_multiple_of", 0) is not None or not fits:
        return collator
    changed = copy.copy(collator)
    changed.pad_to_multiple_of = 8
    return changed


def _losses(smoothing: float) -> LossFunction:
    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return _cross_entropy(model, model(**inputs).logits, batch.get("labels"), smoothing)

    return losses


def _cross_entropy(
    model: nn.Module, logits: Tensor, labels: Tensor | None, smoothing: float
) -> Tensor:
    """Return the cross entropy of each record, shape (n,)."""
    if labels is None or labels.is_floating_point() or logits.ndim - labels.ndim != 1:
        shapes = (tuple(logits.shape), None if labels is None else tuple(labels.shape))
        allowed = "a class or tokens for each record; for any other task pass losses"
        raise InvalidValue("shapes of logits and labels", shapes, allowed)
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    if _predicts_the_next(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    tokens = F.cross_entropy(logits.mT, labels, reduction="none", label_smoothing=smoothing)
    return tokens.sum(1) / (labels != -100).sum(1).clamp_min(1)


def _predicts_the_next(model: Any) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "CausalLM" in type(base).__name__ or "LMHeadModel" in type(base).__name__
