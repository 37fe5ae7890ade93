"""Measuring a model on records, and the figures of classifiers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora_flwr.data.records import Batch, Records, lengths_of
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.lora.wide_numbers import with_fp64


def measured(
    model: nn.Module, records: Records, batch_size: int, measure: Callable[[Batch], Tensor]
) -> Tensor:
    """Measure all records in batches of similar length, without changing the model.

    Parameters
    ----------
    model : nn.Module
        The model, in evaluation mode during the call. Batches are moved to its device.
    records : Records
        At least one record.
    batch_size : int
        Records per forward pass.
    measure : Callable[[Batch], Tensor]
        Measures a batch and returns fp64 of shape (figures, k), with any k per batch.

    Returns
    -------
    Tensor
        The measurements of all batches side by side, on the CPU: shape (figures, sum of all k). The
        order is not that of the records.

    Raises
    ------
    InvalidValue
        There are no records.
    """
    if len(records) == 0:
        raise InvalidValue("records", 0, "at least one record to evaluate on")
    device = next(model.parameters()).device
    found: list[Tensor] = []
    with evaluating(model), torch.inference_mode():
        for indices in torch.split(in_order_of_length(records), batch_size):
            batch = {key: value.to(device) for key, value in records.batch(indices).items()}
            found.append(measure(batch).cpu())
    return torch.cat(found, dim=1)


def evaluate_classifier(
    model: nn.Module,
    records: Records,
    logits: Callable[[Batch], Tensor],
    batch_size: int = 512,
    parts: Sequence[str] = (),
) -> dict[str, float]:
    """Measure a classifier without changing it.

    Parameters
    ----------
    model : nn.Module
        The model, in evaluation mode during the call. Batches are moved to its device.
    records : Records
        At least one record, with the field ``label``.
    logits : Callable[[Batch], Tensor]
        Calls the model; shape (n, classes).
    batch_size : int (default: 512)
        Records per forward pass.
    parts : Sequence[str] (default: ())
        Names of the parts that the field ``part`` of a record numbers from 0. If there are two or
        more, each is also measured by itself.

    Returns
    -------
    dict[str, float]
        ``loss``, the mean cross entropy in nats, and ``accuracy`` in [0, 1], over all records. With
        several parts also ``loss_<part>`` and ``accuracy_<part>``.

    Raises
    ------
    InvalidValue
        There are no records.
    """

    def measure(batch: Batch) -> Tensor:
        scores, labels = with_fp64(logits(batch).float()), with_fp64(batch["label"])
        losses = F.cross_entropy(scores, labels, reduction="none").double()
        hits = (scores.argmax(dim=1) == labels).double()
        part = with_fp64(batch.get("part", torch.full_like(labels, -1))).double()
        return torch.stack((losses, hits, part))

    losses, hits, part = measured(model, records, batch_size, measure)
    metrics = {"loss": losses.mean().item(), "accuracy": hits.mean().item()}
    for number, name in enumerate(parts if len(parts) > 1 else ()):
        mine = part == number
        if mine.any():
            metrics[f"loss_{name}"] = losses[mine].mean().item()
            metrics[f"accuracy_{name}"] = hits[mine].mean().item()
    return metrics


def scores_of(
    model: nn.Module, records: Records, logits: Callable[[Batch], Tensor], batch_size: int = 512
) -> Tensor:
    """Return a classifier's scores of all records, without changing the model.

    Parameters
    ----------
    model, records, logits, batch_size
        As for `evaluate_classifier`; the records need no ``label``.

    Returns
    -------
    Tensor
        fp64, shape (n, classes), in the order of the records.

    Raises
    ------
    InvalidValue
        There are no records.
    """
    found = measured(
        model, records, batch_size, lambda batch: with_fp64(logits(batch)).double().T
    ).T
    ordered = torch.empty_like(found)
    ordered[in_order_of_length(records)] = found
    return ordered


def class_predictions(scores: Tensor, classes: Sequence[str]) -> dict[str, list[object]]:
    """Return what a classifier says of each record.

    Parameters
    ----------
    scores : Tensor
        Scores of the classes, shape (n, classes).
    classes : Sequence[str]
        Names of the classes in the order of the scores.

    Returns
    -------
    dict[str, list]
        ``prediction``, the name of the class with the highest score, and ``probability``, its
        probability by softmax, in [0, 1].
    """
    probabilities, best = scores.softmax(dim=1).max(dim=1)
    return {
        "prediction": [classes[number] for number in best.tolist()],
        "probability": list(probabilities.tolist()),
    }


def in_order_of_length(records: Records) -> Tensor:
    """Return all positions, int64, ordered by the records' lengths where these are known."""
    everything = torch.arange(len(records))
    lengths = lengths_of(records, everything)
    return everything if lengths is None else torch.from_numpy(lengths.argsort(kind="stable"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and afterwards each of its modules back in its own mode."""
    # A frozen backbone may be in another mode than the adapters in it.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
