"""Evaluation of classifiers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.tasks.registry import Batch, Records


def evaluate_classifier(
    model: nn.Module,
    records: Records,
    logits: Callable[[Batch], Tensor],
    batch_size: int = 512,
) -> dict[str, float]:
    """Measure a classifier without changing it.

    Parameters
    ----------
    model : nn.Module
        Put in evaluation mode meanwhile; batches are moved to its device.
    records : Records
        At least one record, with the field ``label``.
    logits : Callable[[Batch], Tensor]
        Calls the model; shape (n, classes).
    batch_size : int (default: 512)
        Records per forward pass.

    Returns
    -------
    dict[str, float]
        ``loss``, the mean cross entropy in nats, and ``accuracy`` in [0, 1].

    Raises
    ------
    InvalidValue
        There are no records.
    """
    if len(records) == 0:
        raise InvalidValue("records", 0, "at least one record to evaluate on")
    device = next(model.parameters()).device
    loss, hits = 0.0, 0
    with _evaluating(model), torch.inference_mode():
        for start in range(0, len(records), batch_size):
            indices = torch.arange(start, min(start + batch_size, len(records)))
            batch = {key: value.to(device) for key, value in records.batch(indices).items()}
            scores, labels = logits(batch).float(), batch["label"]
            loss += F.cross_entropy(scores, labels, reduction="none").double().sum().item()
            hits += int((scores.argmax(dim=1) == labels).sum().item())
    return {"loss": loss / len(records), "accuracy": hits / len(records)}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    # Module by module: a frozen backbone may be in another mode than the adapters in it.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
