"""The common part of all tasks on a named data set: opening it, limits, and a client's part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.unit import USER
from fedlora_flwr.data.arrow_records import ArrowRecords
from fedlora_flwr.data.names import names
from fedlora_flwr.data.partition import client_values, partition_records
from fedlora_flwr.data.parts import Parts
from fedlora_flwr.data.reading import Reading, empty_texts
from fedlora_flwr.data.records import Batch
from fedlora_flwr.data.sources import load_split, passed_over, split_files
from fedlora_flwr.data.splits import Split
from fedlora_flwr.data.splits_apart import (
    check_files_apart,
    check_records_apart,
    shared_places,
    shared_records,
)
from fedlora_flwr.data.unusable import naming, naming_split
from fedlora_flwr.data.users import about_users, units_by_client, users_in
from fedlora_flwr.errors import InvalidValue

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

# Not the run's seed: different runs must be measured on the same records.
_LIMIT_SEED = 2024


class DatasetTask(ABC):
    """A task on a named model and a named data set.

    A split is opened only when it is needed, so a server that evaluates never reads the private
    split.

    Parameters
    ----------
    settings : RunConfig
        Model, data set and split.

    Raises
    ------
    InvalidValue
        No model or no data set is named.
    """

    name: str
    metric: str
    # Fields that are read from a column of structures; empty for all.
    _input_fields: tuple[str, ...] = ()

    def __init__(self, settings: RunConfig) -> None:
        self._settings = settings
        if not settings.model:
            allowed = f"a name or a folder, which task = {self.name!r} needs"
            raise InvalidValue("model", "", allowed)
        if not settings.dataset:
            allowed = f"files, a folder or a hub name, which task = {self.name!r} needs"
            raise InvalidValue("dataset", "", allowed)
        if settings.unit == USER and not settings.user_column:
            allowed = "the column that names the user of each record, which unit = 'user' needs"
            raise InvalidValue("user-column", "", allowed)

    @property
    @abstractmethod
    def head(self) -> tuple[str, ...]:
        """Names of the modules that form the task head."""

    @property
    @abstractmethod
    def lora_targets(self) -> str:
        """Default pattern of adapted modules; empty for the usual ones of transformers models."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Return a new model with its head, the same weights in every process."""

    @abstractmethod
    def skeleton(self, device: str = "meta") -> nn.Module:
        """Return the model without pretrained weights: only shapes on ``"meta"``, else random."""

    @abstractmethod
    def largest_batch(self, records: int) -> Batch:
        """Return a batch of the largest possible shapes. Its values have no meaning."""

    @abstractmethod
    def made_up_batch(self, records: int) -> Batch:
        """Return made-up records of the largest possible size, which a model can read."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of each record, shape (n,)."""

    @abstractmethod
    def _prepare(self, dataset: Dataset, *, training: bool) -> ArrowRecords:
        """Turn a split into records."""

    @abstractmethod
    def _input_columns(self, dataset: Dataset) -> list[str]:
        """Return the columns that the model reads, without the class."""

    def client_records(self, partition_id: int, num_partitions: int) -> ArrowRecords:
        """Return the private records of one simulated client.

        Raises
        ------
        InvalidValue
            There is no such client, or the data set cannot be read or partitioned as configured.
        """
        parts = self._parts(num_partitions)
        if not 0 <= partition_id < len(parts):
            raise InvalidValue("partition-id", partition_id, f"0 to {len(parts) - 1}")
        return self._private.subset(parts[partition_id])

    def client_units(self, num_partitions: int) -> NDArray[np.int64]:
        """Return the number of records, or of users, of each client, shape (num_partitions,)."""
        parts = self._parts(num_partitions)
        return units_by_client(self._settings.unit, parts, self._users)

    def client_values(self, num_partitions: int) -> list[str]:
        """Return the value of the partition column that each client is made of, if it is of one."""
        return client_values(self._columns(), self._split(num_partitions))

    def test_records(self) -> ArrowRecords:
        """Return the public records of all test splits.

        Raises
        ------
        InvalidValue
            The data set cannot be read.
        """
        return self._public

    def reading(self, num_partitions: int) -> list[Reading]:
        """Return which records are read and left out, for the private split and each test split.

        Parameters
        ----------
        num_partitions : int
            Clients of a simulation; 1 on a device.

        Raises
        ------
        InvalidValue
            A split cannot be opened, or not partitioned as configured.
        """
        settings = self._settings
        found = self.private_reading()
        parts = self._parts(num_partitions)
        found.leave_out("that no client gets", found.used - len(parts.positions))
        if self._users is not None:
            found.notes += about_users(self._users, parts)[1:]
        tests = [self._reading(split, settings.test_limit) for split in self.test_splits]
        for test in tests:
            test.notes += self._shared(test)
        return [found, *tests]

    def _shared(self, test: Reading) -> list[str]:
        """Return a sentence on private records that the server would measure on, too."""
        settings = self._settings
        private = self._usable(settings.train_split, settings.train_limit)
        public = self._usable(test.split, settings.test_limit)
        columns = self._input_columns(private)
        if set(columns) != set(self._input_columns(public)):
            return []
        count = shared_records(private, public, columns, self._input_fields)
        text = (
            f"warning: {count:,} of the {len(private):,} records of {settings.train_split!r} are "
            "in this split, too, so its figures are too good. Take them out of one of the two"
        )
        return [text] if count else []

    def private_reading(self) -> Reading:
        """Return which records of the private split are read and which are left out."""
        found = self._reading(self._settings.train_split, self._settings.train_limit)
        if self._users is not None:
            found.notes += about_users(self._users)
        return found

    def _reading(self, split: str, limit: int) -> Reading:
        settings, dataset, used = self._settings, self._source(split), self._usable(split, limit)
        with naming(dataset):
            found = Reading(split, len(dataset), tuple(self._columns_of(dataset, split)))
        found.leave_out_rows(self._lacking(dataset))
        found.leave_out("beyond the limit", found.used - len(used))
        subset = settings.dataset_subset
        found.notes += passed_over(settings.dataset, split, subset=subset) + self._notes(used)
        return found

    def check_splits_apart(self) -> None:
        """Refuse test splits that contain private records, even under other names of splits.

        All records of the splits are compared, including those that a limit or a missing class
        leaves out.

        Raises
        ------
        InvalidValue
            A test split shares a file or a record with the private split
            (`fedlora_flwr.data.splits_apart`), is read from other columns, or cannot be opened.
        """
        settings, subset = self._settings, self._settings.dataset_subset
        everything = (settings.train_split, *self.test_splits)
        if not self.test_splits:
            raise InvalidValue("test-split", settings.test_split, "names of splits")
        opened = {split: self._source(split) for split in everything}
        private, *tests = (split_files(settings.dataset, s, subset=subset) for s in everything)
        named = dict(zip(self.test_splits, tests, strict=True))
        check_files_apart(private, named, settings.train_split)
        columns = {split: self._input_columns(dataset) for split, dataset in opened.items()}
        read = columns[settings.train_split]
        for split in self.test_splits:
            if set(columns[split]) != set(read):
                raise self._other_columns(split, columns[split], read)
        check_records_apart(
            opened[settings.train_split],
            {split: opened[split] for split in self.test_splits},
            read,
            settings.train_split,
            self._input_fields,
        )

    @cached_property
    def test_splits(self) -> tuple[str, ...]:
        """Names of the test splits."""
        return names(self._settings.test_split)

    @cached_property
    def _train(self) -> Dataset:
        return self._usable(self._settings.train_split, self._settings.train_limit)

    @cached_property
    def _private(self) -> ArrowRecords:
        with naming(self._train):
            found = self._prepare(self._train, training=True)
            found.users = self._users
            return found

    @cached_property
    def _users(self) -> NDArray[np.int64] | None:
        return users_in(self._train, self._settings.user_column)

    @cached_property
    def _public(self) -> ArrowRecords:
        with naming(self._test):
            return self._prepare(self._test, training=False)

    @cached_property
    def _test(self) -> Dataset:
        import datasets

        splits = self._opened_tests
        try:
            return splits[0] if len(splits) == 1 else datasets.concatenate_datasets(splits)
        except ValueError as error:
            allowed = f"splits with the same columns ({' '.join(str(error).split())})"
            raise InvalidValue("test-split", self._settings.test_split, allowed) from error

    @cached_property
    def _opened_tests(self) -> list[Dataset]:
        if not self.test_splits:
            raise InvalidValue("test-split", self._settings.test_split, "names of splits")
        return [self._usable(split, self._settings.test_limit) for split in self.test_splits]

    def _usable(self, split: str, limit: int) -> Dataset:
        """Open a split, and drop records that cannot be used and those beyond the limit."""
        if (split, limit) not in self._chosen:
            self._chosen[split, limit] = self._choose(self._source(split), split, limit)
        return self._chosen[split, limit]

    @cached_property
    def _chosen(self) -> dict[tuple[str, int], Dataset]:
        return {}

    def _choose(self, dataset: Dataset, split: str, limit: int) -> Dataset:
        with naming(dataset):
            rows = self._rows(dataset, split)
        if limit and limit < len(rows):
            chosen = np.random.default_rng(_LIMIT_SEED).permutation(len(rows))[:limit]
            rows = rows[np.sort(chosen)]
        return dataset if len(rows) == len(dataset) else dataset.select(rows)

    def _private_source(self) -> Dataset | None:
        """Open the private split. None where it is missing, as on a server that only evaluates."""
        try:
            return self._source(self._settings.train_split)
        except InvalidValue:
            return None

    def _also_private(self) -> set[int]:
        """Return the positions of public records that are private, too, as far as is known here.

        A server that only evaluates has no private split to compare with.
        """
        private, columns = self._private_source(), self._input_columns(self._test)
        if private is None or set(self._input_columns(private)) != set(columns):
            return set()
        return shared_places(private, self._test, columns, self._input_fields)

    def _other_columns(self, split: str, own: list[str], known: list[str]) -> InvalidValue:
        allowed = (
            f"columns that all splits have, but {split!r} has {own}, not {known}. Name those to "
            "read"
        )
        return InvalidValue("input-columns", self._settings.input_columns, allowed)

    def _columns_of(self, dataset: Dataset, split: str) -> list[str]:  # noqa: ARG002
        """Return the columns that are read from a split."""
        return self._input_columns(dataset)

    def _source(self, split: str) -> Dataset:
        """Open a split; later calls return the same object."""
        if split not in self._sources:
            settings = self._settings
            with naming_split("train-split" if split == settings.train_split else "test-split"):
                found = load_split(settings.dataset, split, subset=settings.dataset_subset)
            self._sources[split] = found
        return self._sources[split]

    @cached_property
    def _sources(self) -> dict[str, Dataset]:
        return {}

    def _rows(self, dataset: Dataset, split: str) -> NDArray[np.int64]:  # noqa: ARG002
        """Return the positions of the records that can be used."""
        chosen = np.ones(len(dataset), dtype=bool)
        for rows in self._lacking(dataset).values():
            chosen[rows] = False
        return np.flatnonzero(chosen)

    def _lacking(self, dataset: Dataset) -> dict[str, NDArray[np.int64]]:  # noqa: ARG002
        """Return the positions of records that cannot be used, by what is wrong with them."""
        return {}

    def _notes(self, dataset: Dataset) -> list[str]:
        """Return sentences about records that are used although they look like a mistake."""
        return empty_texts(dataset, self._input_columns(dataset))

    def _parts(self, num_partitions: int) -> Parts:
        found = self._dealt.get(num_partitions)
        if found is None:
            found = partition_records(self._columns(), self._split(num_partitions))
            self._dealt[num_partitions] = found
        return found

    def _split(self, num_partitions: int) -> Split:
        return Split.of(self._settings, num_partitions, self._settings.seed)

    @cached_property
    def _dealt(self) -> dict[int, Parts]:
        return {}

    def _columns(self) -> dict[str, NDArray[Any]]:
        """Return the columns by which clients can share the records, one value per record."""
        settings, dataset = self._settings, self._train
        chosen = {
            "label": settings.label_column,
            settings.partition_column: settings.partition_column,
        }
        columns = {"row": np.arange(len(dataset))}
        for name, source in chosen.items():
            if source in dataset.features:
                columns[name] = np.asarray(dataset[source][:])
        return columns
