"""How well a client's own model does on the classes that the client has, in a simulation."""

from __future__ import annotations

import torch
from torch import nn

from fedlora_flwr.data.records import Records, labels_of
from fedlora_flwr.tasks.registry import Task, optional
from fedlora_flwr.wire import OWN_LABELS


def on_own_labels(
    task: Task, model: nn.Module, public: Records, private: Records
) -> dict[str, float]:
    """Measure a model on public records, each class weighted by its share of private ones.

    A model of a client's own is trained for the client's classes. The plain accuracy asks whether
    it serves everybody, and this one whether it serves the client. The figure tells of the client's
    labels without any noise, so it is for simulations only.

    Parameters
    ----------
    task : Task
        The task. One without ``scores`` is not a classifier.
    model : nn.Module
        The client's model.
    public : Records
        The public test set.
    private : Records
        The client's private records.

    Returns
    -------
    dict[str, float]
        ``accuracy_own_labels`` in [0, 1]: the sum over the client's classes of the accuracy on a
        class times its share of the client's records. A class that no public record has is left
        out, and the shares of the others are scaled to one. If all are left out, it is the plain
        accuracy, so that all clients tell the same figures. Empty if the task is not a classifier.
    """
    scores = optional(task, "scores")
    if scores is None:
        return {}
    labels, own = labels_of(public), labels_of(private)
    if labels is None or own is None:
        return {}
    found = scores(model, public)
    count = max(found.shape[1], int(own.max()) + 1)
    hits = (found.argmax(dim=1) == labels).double()
    tested = torch.bincount(labels, minlength=count).double()
    right = torch.bincount(labels, weights=hits, minlength=count)
    shares = torch.bincount(own, minlength=count).double() * (tested > 0)
    shares = shares if shares.sum() else tested
    return {OWN_LABELS: float((shares * right / tested.clamp(min=1)).sum() / shares.sum())}
