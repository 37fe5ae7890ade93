"""What the tasks on a named data set read of the run configuration."""

from __future__ import annotations

from typing import Protocol

from fedlora_flwr.data.splits import SplitSettings


class DatasetSettings(SplitSettings, Protocol):
    """What the tasks read: a part of the run configuration."""

    @property
    def model(self) -> str:
        """Name of a model, or a folder with one."""
        ...

    @property
    def weights(self) -> str:
        """``"pretrained"``, ``"random"``, or a file of weights for a timm model."""
        ...

    @property
    def quantization(self) -> str:
        """``"none"``, ``"8bit"`` or ``"4bit"``."""
        ...

    @property
    def pooling(self) -> str:
        """``"model"`` or ``"mean"``: what a text's class is read from."""
        ...

    @property
    def dataset(self) -> str:
        """What `fedlora_flwr.data.sources.load_split` takes."""
        ...

    @property
    def dataset_subset(self) -> str:
        """A folder of the source, or a configuration of the hub's data set."""
        ...

    @property
    def train_split(self) -> str:
        """Name of the split with the private records."""
        ...

    @property
    def test_split(self) -> str:
        """Names of the public splits, with commas between them."""
        ...

    @property
    def input_columns(self) -> str:
        """Names of the columns to learn from, with commas between them; empty: by their type."""
        ...

    @property
    def label_column(self) -> str:
        """Name of the column with the class."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 counts those of the private split."""
        ...

    @property
    def class_names(self) -> str:
        """Names of the classes in the order of their numbers, with commas between them."""
        ...

    @property
    def train_limit(self) -> int:
        """Records of the private split to use; 0 for all."""
        ...

    @property
    def test_limit(self) -> int:
        """Records of the public splits to use; 0 for all."""
        ...

    @property
    def max_length(self) -> int:
        """Tokens of a record that are read."""
        ...

    @property
    def split_qkv(self) -> bool:
        """Whether fused queries, keys and values of a timm model become layers of their own."""
        ...

    @property
    def image_size(self) -> int:
        """Height and width of pictures; 0 for the model's own."""
        ...

    @property
    def eval_batch_size(self) -> int:
        """Records in one forward pass of an evaluation."""
        ...

    @property
    def report_unprotected_metrics(self) -> bool:
        """Whether clients measure their private records."""
        ...


def names(text: str) -> tuple[str, ...]:
    """Split names with commas between them."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
