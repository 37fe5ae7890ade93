"""Canaries: records of a client that the attacker knows, and decides to see or not to see.

An absent canary's gradient is zero in every step, which is the promise's own neighbor (zero-out).
All else is as in a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.data.records import Batch, Records
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import is_shared
from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.randomness import stream_seed
from fedlora_flwr.tasks.chats import IGNORED
from fedlora_flwr.tasks.registry import Task, class_names
from fedlora_flwr.tasks.views import training_losses

GRADIENT, SCALED, LABEL, TOKENS = "gradient", "scaled", "label", "tokens"
KINDS: Mapping[str, str] = {
    GRADIENT: "a gradient along one random direction that fills the clip norm",
    SCALED: "a real record whose loss is multiplied until its gradient fills the clip norm",
    LABEL: "a real record with a wrong label",
    TOKENS: "a text of random tokens",
}
"""The kinds of canaries, and what each is."""
_BLACK_BOX = {"instruction-tuning": TOKENS, "question-answering": SCALED}
FULL = 1e4
"""Enough for a gradient that is longer than any usual clip norm."""
_WEIGHT, _NUMBER = "audit-weight", "audit-number"
_NONE = -1


def default_kind(task: str, *, black_box: bool) -> str:
    """Return the kind that tells most: for a black box, one that a model's loss can show."""
    return _BLACK_BOX.get(task, LABEL) if black_box else GRADIENT


@dataclass(frozen=True)
class Canaries:
    """What the canaries of a client look like.

    Parameters
    ----------
    kind : str
        One of `KINDS`.
    choices : int
        Classes or tokens to choose from, for the kinds ``"label"`` and ``"tokens"``.
    """

    kind: str
    choices: int = 0

    @classmethod
    def of(cls, kind: str, task: Task, model: nn.Module) -> Canaries:
        """Return canaries of a kind for a task.

        Raises
        ------
        InvalidValue
            The task has no labels, or reads no tokens.
        """
        if kind not in KINDS:
            raise InvalidValue("canary", kind, f"one of {', '.join(KINDS)}")
        if kind == LABEL:
            choices = len(class_names(task))
            if choices < 2:
                raise InvalidValue("canary", kind, f"a kind other than {kind!r} for this task")
            return cls(kind, choices)
        if kind == TOKENS:
            embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
            if embeddings is None:
                raise InvalidValue("canary", kind, f"a kind other than {kind!r} for this task")
            return cls(kind, int(embeddings.num_embeddings))
        return cls(kind)

    @property
    def weight(self) -> float:
        """What the loss of a present canary is multiplied by."""
        return FULL if self.kind in (GRADIENT, SCALED) else 1.0

    def changed(self, batch: Batch, rows: Sequence[int], names: Sequence[int]) -> Batch:
        """Return a batch in which some rows are canaries; each depends on its name alone."""
        if self.kind == LABEL:
            labels = batch["label"].clone()
            labels[list(rows)] = (labels[list(rows)] + 1) % self.choices
            return {**batch, "label": labels}
        if self.kind != TOKENS:
            return batch
        made = {name: tensor.clone() for name, tensor in batch.items()}
        for row, name in zip(rows, names, strict=True):
            length = int(batch["attention_mask"][row].sum())
            drawn = np.random.default_rng(stream_seed(0, "audit-tokens", name))
            tokens = torch.from_numpy(drawn.integers(self.choices, size=length))
            made["input_ids"][row][batch["attention_mask"][row] == 1] = tokens
            if "labels" in made:
                made["labels"][row] = made["input_ids"][row].masked_fill(
                    batch["attention_mask"][row] == 0, IGNORED
                )
                made["answer_tokens"][row] = length - 1
        return made


class AuditRecords:
    """A client's first records: some are canaries, and the others are silent.

    The attacker is assumed to know all records but the canaries, so it could take their gradients
    away from an upload. Here they are zero from the start, which is the same and costs nothing.

    Parameters
    ----------
    records : Records
        The client's records.
    count : int
        How many of them to keep. The first are the canaries.
    canaries : Canaries
        What the canaries look like.
    present : Sequence[bool]
        For each canary, whether it takes part.
    first : int (default: 0)
        Number of the first canary. Canaries of different clients need different numbers.
    """

    def __init__(
        self,
        records: Records,
        count: int,
        canaries: Canaries,
        present: Sequence[bool],
        first: int = 0,
    ) -> None:
        # The content of a record does not matter where a gradient replaces its own.
        if canaries.kind != GRADIENT and count > len(records):
            raise InvalidValue("records", count, f"at most {len(records)}, those of the client")
        self._records, self._count, self._canaries = records, count, canaries
        self._positions = torch.arange(count) % len(records)
        self._weights = torch.zeros(count)
        self._weights[: len(present)] = canaries.weight * torch.tensor(present).float()
        self._numbers = torch.full((count,), _NONE)
        self._numbers[: len(present)] = torch.arange(first, first + len(present))

    def __len__(self) -> int:
        """Return the number of records."""
        return self._count

    @property
    def directed(self) -> bool:
        """Whether the canaries' gradients depend on nothing but their numbers."""
        return self._canaries.kind == GRADIENT

    @property
    def lengths(self) -> NDArray[Any] | None:
        """Number of tokens of each record, where the records have one."""
        lengths: NDArray[Any] | None = getattr(self._records, "lengths", None)
        return None if lengths is None else lengths[self._positions.numpy()]

    @property
    def alike(self) -> bool:
        """Whether all records have tensors of the same shape."""
        return bool(getattr(self._records, "alike", False))

    def batch(self, indices: Tensor) -> Batch:
        """Return the records at ``indices``, with the number and the weight of each."""
        numbers = self._numbers[indices]
        rows = [row for row, number in enumerate(numbers.tolist()) if number != _NONE]
        found = self._canaries.changed(
            self._records.batch(self._positions[indices]), rows, [int(numbers[row]) for row in rows]
        )
        return {**found, _WEIGHT: self._weights[indices], _NUMBER: numbers}


class AuditTask:
    """A task whose losses are multiplied where a batch says so; all else is the task's own.

    Parameters
    ----------
    task : Task
        The task.
    """

    def __init__(self, task: Task) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the task."""
        return getattr(self._task, name)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of each record, shape (n,)."""
        own = {name: tensor for name, tensor in batch.items() if name not in (_WEIGHT, _NUMBER)}
        losses = self._task.losses(model, own)
        return losses * batch[_WEIGHT] if _WEIGHT in batch else losses


class DirectedEngine(PrivateEngine):
    """An engine in which the gradient of a canary is replaced by one along a direction.

    Everything that follows is the engine's own: clipping, noise, the step and its checks.

    Parameters
    ----------
    *args, **kwargs
        As for `PrivateEngine`.
    shared : str
        Factors that leave a client; empty for all. The directions lie in these arrays, where the
        attacker can see them.
    """

    def __init__(self, *args: Any, shared: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shared = shared

    def _fill(
        self, batch: Batch, count: int, active: Sequence[str], of: slice = slice(None)
    ) -> None:
        super()._fill(batch, count, active, of)
        if _NUMBER not in batch:
            return
        numbers, weights = batch[_NUMBER], batch[_WEIGHT]
        for row in range(count)[of]:
            if (number := int(numbers[row])) != _NONE:
                for name in active:
                    found: Any = self.adapted.parameters[name].grad_sample  # type: ignore[attr-defined]
                    found[row] = float(weights[row]) * self._direction(number, name).to(found)

    def _direction(self, number: int, name: str) -> Tensor:
        shape = self.adapted.parameters[name].shape
        if not is_shared(name, self._shared):
            return torch.zeros(shape)
        drawn = np.random.default_rng(stream_seed(0, "audit-direction", number, name))
        return torch.from_numpy(drawn.standard_normal(shape))


def directed(trainer: LocalTrainer, shared: str) -> LocalTrainer:
    """Return a trainer on the same model whose canaries have gradients along directions.

    Parameters
    ----------
    trainer : LocalTrainer
        A trainer, which must not be used any more.
    shared : str
        Factors that leave a client; empty for all.
    """
    size = trainer.config.microbatch_size or None
    losses = training_losses(trainer.config, trainer.task)
    return replace(trainer, engine=DirectedEngine(trainer.adapted, losses, size, shared=shared))
