"""Several changed views of each picture, whose gradients are averaged before the clip.

A private step clips one gradient per record. That gradient may be the mean over K views of the
record: pictures that are shifted, or mirrored as well (augmentation multiplicity, arXiv 2204.13650,
section 3.2). The mean is clipped to C like any gradient of one record, so the sensitivity stays C.
Views are made from one record and random draws alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlora_flwr.config.sections.training import TrainingSection
from fedlora_flwr.data.records import Batch
from fedlora_flwr.errors import InvalidValue, PrivacyViolation
from fedlora_flwr.tasks.registry import Task, optional

_PART = 8  # A picture is shifted by up to one eighth of its side, 4 pixels of 32.
Losses = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Views:
    """Makes K views of each picture in a batch.

    Parameters
    ----------
    count : int
        K, at least 1.
    mirror : bool (default: False)
        Whether half of the views are mirrored, left to right.
    field : str (default: "image")
        The field of the batch with the pictures, shape (n, channels, h, w).

    Examples
    --------
    >>> batch = {"image": torch.zeros(2, 1, 8, 8), "label": torch.tensor([3, 5])}
    >>> made = Views(3)(batch)
    >>> made["image"].shape, made["label"].tolist()
    (torch.Size([6, 1, 8, 8]), [3, 3, 3, 5, 5, 5])
    """

    count: int
    mirror: bool = False
    field: str = "image"

    def __call__(self, batch: Batch) -> Batch:
        """Return a batch in which each record stands K times in a row, each time as another view.

        Draws come from torch's own generator on the CPU, which a client seeds for each round apart
        from its noise and its batches (see `fedlora_flwr.privacy.masks.own_randomness`).

        Parameters
        ----------
        batch : Batch
            n records.

        Returns
        -------
        Batch
            n·K records; pictures keep their type.
        """
        repeated = {
            name: tensor.repeat_interleave(self.count, dim=0) for name, tensor in batch.items()
        }
        pictures = repeated[self.field]
        rows, columns = pictures.shape[-2:]
        # One draw of a fixed shape for each view: as many for a picture that is not mirrored.
        draws = torch.rand(len(pictures), 3).to(pictures.device)
        down, right = _shifted(rows, draws[:, 0]), _shifted(columns, draws[:, 1])
        if self.mirror:
            right = torch.where(draws[:, 2:] < 0.5, right.flip(1), right)
        places = torch.arange(len(pictures), device=pictures.device)[:, None, None]
        views = pictures.movedim(1, -1)[places, down[:, :, None], right[:, None, :]]
        return {**repeated, self.field: views.movedim(-1, 1)}

    def over(self, losses: Losses) -> Losses:
        """Return a loss that is the mean over K views of each record, shape (n,).

        Raises
        ------
        PrivacyViolation
            Raised by the returned function if ``losses`` does not return one loss per view.
        """

        def mean(model: nn.Module, batch: Batch) -> Tensor:
            views = self(batch)
            found, count = losses(model, views), len(views[self.field])
            if found.shape != (count,):
                raise PrivacyViolation(
                    f"The task returned losses of shape {tuple(found.shape)} for {count} views; "
                    "one loss per view is needed."
                )
            return found.view(-1, self.count).mean(dim=1)

        return mean


def training_losses(config: TrainingSection, task: Task) -> Losses:
    """Return the loss that a private step takes: the task's own, or its mean over views.

    Parameters
    ----------
    config : TrainingSection
        Its ``augmentation`` and ``views``.
    task : Task
        Its member ``picture_field`` names the field with pictures, if it has one.

    Raises
    ------
    InvalidValue
        Views are asked for, and the task's records are not pictures.
    """
    if config.augmentation == "none":
        return task.losses
    field = optional(task, "picture_field")
    if field is None:
        allowed = f"'none' for task {task.name!r}, whose records are not pictures"
        raise InvalidValue("augmentation", config.augmentation, allowed)
    return Views(config.views, config.augmentation == "shift-mirror", field()).over(task.losses)


def _shifted(size: int, draws: Tensor) -> Tensor:
    """Return for each draw the positions along a shifted side, shape (n, size).

    What would be outside is mirrored at the edge, which is not repeated.
    """
    most = size // _PART
    offsets = (draws * (2 * most + 1)).long().clamp(max=2 * most) - most
    places = (torch.arange(size, device=draws.device) + offsets[:, None]).abs()
    return torch.where(places < size, places, 2 * (size - 1) - places)
