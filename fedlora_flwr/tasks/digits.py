"""The built-in task: handwritten digits, on a transformer that was pretrained on printed ones.

It needs no download. The records are scikit-learn's copy of the "Optical Recognition of Handwritten
Digits" test set (UCI, 1998): 1797 pictures of 8x8 pixels, of which 1437 are private.
"""

from __future__ import annotations

import hashlib
from functools import cache, lru_cache
from importlib.metadata import version

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor, nn

from fedlora_flwr.backbones.pretrain_digits import build_vit, load_backbone
from fedlora_flwr.config import RunConfig
from fedlora_flwr.data.cached_file import read_or_build
from fedlora_flwr.data.partition import client_values, partition_records
from fedlora_flwr.data.parts import Parts
from fedlora_flwr.data.records import Batch, Records, TensorRecords
from fedlora_flwr.data.splits import Split
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.files import cache_folder
from fedlora_flwr.tasks.evaluation import evaluate_classifier, scores_of

_TEST_SHARE = 0.2
# Not the run's seed: different runs must be measured on the same test set.
_SPLIT_SEED = 2024
_FULL_INK = 16.0


class DigitsTask:
    """Classify handwritten digits.

    Batches are ``{"image": (n, 1, 8, 8) fp32 in [0, 1], "label": (n,) int64}``.

    Parameters
    ----------
    settings : RunConfig
        The run configuration; its keys under ``[partition]`` tell how clients share the records.
    """

    name = "digits"
    metric = "accuracy"
    # Only attention: with the MLPs, twice as many coordinates are clipped, noised and sent. They
    # gain about one point of accuracy, which 360 test records can hardly tell from chance.
    lora_targets = r"blocks\.\d+\.attn\.(qkv|proj)"
    head: tuple[str, ...] = ("head",)

    def __init__(self, settings: RunConfig) -> None:
        self._settings = settings

    def build_model(self) -> nn.Module:
        """Return the backbone with its head; the first call on a machine pretrains it.

        Raises
        ------
        InvalidValue
            The backbone is not cached yet and the cache folder cannot be written to.
        """
        model = build_vit()
        model.load_state_dict(load_backbone())
        return model

    def client_records(self, partition_id: int, num_partitions: int) -> Records:
        """Return one client's private digits; the same object for the same arguments.

        Raises
        ------
        InvalidValue
            There is no such client, or the records cannot be partitioned as configured.
        """
        split = Split.of(self._settings, num_partitions, self._settings.seed)
        return _client(split, partition_id)

    def client_values(self, num_partitions: int) -> list[str]:
        """Return the value of the partition column that each client is made of, if it is of one."""
        return client_values(_columns(), Split.of(self._settings, num_partitions, 0))

    def test_records(self) -> Records:
        """Return the 360 public digits, a fifth of each class, the same for every seed."""
        return _handwritten()[1]

    def class_names(self) -> tuple[str, ...]:
        """Return the digits from 0 to 9."""
        return tuple("0123456789")

    def picture_field(self) -> str:
        """Return the field of a batch that holds pictures."""
        return "image"

    def check_splits_apart(self) -> None:
        """Do nothing: both sets come from one fixed draw without replacement."""

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross entropy of each record, shape (n,)."""
        return F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")

    def evaluate(self, model: nn.Module, records: Records) -> dict[str, float]:
        """Return mean ``loss`` and ``accuracy``, without changing the model's mode."""
        return evaluate_classifier(model, records, lambda batch: model(batch["image"]))

    def scores(self, model: nn.Module, records: Records) -> Tensor:
        """Return each record's scores, shape (n, 10), fp64."""
        return scores_of(model, records, lambda batch: model(batch["image"]))


@cache
def _handwritten() -> tuple[TensorRecords, TensorRecords]:
    """Return the private and the public records."""
    source = repr((version("scikit-learn"), _TEST_SHARE, _SPLIT_SEED))
    mark = hashlib.sha256(source.encode()).hexdigest()[:8]
    # Each process would import scikit-learn for these few pictures.
    kept = load(read_or_build(cache_folder() / "digits" / f"{mark}.safetensors", _from_library))
    everything = TensorRecords({"image": kept["image"], "label": kept["label"]})
    return _subset(everything, kept["private"].numpy()), _subset(everything, kept["public"].numpy())


def _from_library() -> bytes:
    """Return all records, and which are private and public, in safetensors format."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pictures, labels = load_digits(return_X_y=True)
    split = train_test_split(
        np.arange(len(labels)), test_size=_TEST_SHARE, stratify=labels, random_state=_SPLIT_SEED
    )
    images = torch.from_numpy((pictures / _FULL_INK).astype(np.float32)).view(-1, 1, 8, 8)
    private, public = (torch.from_numpy(np.sort(part)) for part in split)
    parts = {"image": images, "label": torch.from_numpy(labels).long()}
    content: bytes = save({**parts, "private": private, "public": public})
    return content


@lru_cache(maxsize=8)
def _parts(split: Split) -> Parts:
    return partition_records(_columns(), split)


def _columns() -> dict[str, NDArray[np.int64]]:
    """Return the columns by which clients can share the records."""
    private = _handwritten()[0]
    return {"label": private.batch(torch.arange(len(private)))["label"].numpy()}


@lru_cache(maxsize=4096)
def _client(split: Split, partition_id: int) -> TensorRecords:
    parts = _parts(split)
    if not 0 <= partition_id < len(parts):
        raise InvalidValue("partition-id", partition_id, f"0 to {len(parts) - 1}")
    return _subset(_handwritten()[0], parts[partition_id])


def _subset(records: TensorRecords, indices: NDArray[np.int64]) -> TensorRecords:
    return TensorRecords(records.batch(torch.from_numpy(indices)))
