"""An adapter that is opened again: its settings, its task and its model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.followed import SAVED, check_known
from fedlora_flwr.config.recipes import config_of
from fedlora_flwr.data.given import as_dataset, is_path
from fedlora_flwr.data.sources import load_split, split_names
from fedlora_flwr.errors import InvalidValue, explained
from fedlora_flwr.lora.build import resolve_device
from fedlora_flwr.lora.loaded import load_adapter
from fedlora_flwr.places import TASKS, holding, is_held, is_place
from fedlora_flwr.tasks.registry import Task, build_task
from fedlora_flwr.trained.saved_task import NAME, READ, is_adapter, read_task

if TYPE_CHECKING:
    from datasets import Dataset

_SPLIT, NO_DATA = "data", "no-data"
# An export is for the checkpoint's own layers, and for its full precision.
_WHOLE = {"split-qkv": False, "quantization": "none", "run-dir": "", "resume": "", "start": ""}


class HasAdapter(Protocol):
    """A run's result, as far as it is needed here."""

    @property
    def adapter(self) -> Path:
        """Folder of the adapter."""
        ...

    @property
    def task(self) -> Any:
        """The task's object, or None if it has a name."""
        ...


Adapter: TypeAlias = "str | Path | HasAdapter"
"""A run's folder, an adapter's folder, or the result of a run."""


@dataclass(frozen=True, eq=False)
class OpenAdapter:
    """An adapter with the task that it was trained for.

    Parameters
    ----------
    folder : Path
        The adapter's folder.
    config : RunConfig
        Settings of the task.
    task : Task
        The task.
    data : Dataset or None (default: None)
        The records that were given.
    whole : bool (default: True)
        Whether the run trained on the checkpoint's own layers, in its own precision.
    """

    folder: Path
    config: RunConfig
    task: Task
    data: Dataset | None = None
    whole: bool = True

    @property
    def is_merged(self) -> bool:
        """Whether the folder holds a whole model, with the adapter in its weights."""
        return not is_adapter(self.folder)

    def require_factors(self) -> None:
        """Refuse a merged model where an adapter is needed.

        Raises
        ------
        InvalidValue
            The folder holds a merged model.
        """
        if self.is_merged:
            allowed = (
                "the folder of a run, or of an adapter. This one holds a model that is merged "
                "already, and a merged model has no factors"
            )
            raise InvalidValue("adapter", str(self.folder), allowed)

    @cached_property
    def model(self) -> Any:
        """The model with its adapter, in evaluation mode on the configured device."""
        device = resolve_device(self.config.device)
        with explained("Building the adapter's model", "Set model to the model of the run."):
            base = self.task.build_model()
        if self.is_merged:
            return base.eval().to(device)
        return load_adapter(base, self.folder, compare=self.whole).to(device)


@contextmanager
def opened(
    adapter: Adapter, data: Any, task: Any, changes: Mapping[str, Any]
) -> Iterator[OpenAdapter]:
    """Open an adapter and the records that it meets.

    Parameters
    ----------
    adapter : str, Path or RunResult
        A run's folder, an adapter's folder, or the result of a run.
    data : str, Path, DataFrame, Dataset or None
        Records: a file, a folder with one split, or a table.
    task : Task or callable, optional
        The task's object if it has no name.
    changes : Mapping[str, Any]
        Settings by key that replace those of the run.

    Raises
    ------
    InvalidValue
        The folder holds no adapter, a setting cannot be used or is none that is read here, the
        records cannot be read, or the folder names a task with code of its own that the caller has
        not named.
    """
    folder = adapter_folder(adapter)
    own = task if task is not None else getattr(adapter, "task", None)
    with ExitStack() as stack:
        given = config_of(read_task(folder), changes)
        if given.task in TASKS:  # A task of the user's own may read any key.
            check_known(SAVED, READ, changes)
        whole = given.quantization == "none" and given.precision == "fp32" and not given.split_qkv
        found = RunConfig.of(given.items(), _WHOLE)
        values: dict[str, Any] = {} if is_adapter(folder) else {"model": str(folder.resolve())}
        if own is not None and not isinstance(own, str):
            values["task"] = stack.enter_context(holding(own))
        elif own is not None:
            values["task"] = own
        elif is_held(found.task):
            allowed = "a name. The run was given its task as an object; give it again as task"
            raise InvalidValue("task", found.task, allowed)
        elif is_place(found.task):
            allowed = (
                "a task of this package. The folder names code of its own, which runs only if you "
                f"name it, too: task = {found.task}"
            )
            raise InvalidValue("task", found.task, allowed)
        records = None
        if data is not None:
            records = _records(data, found.items(), changes)
            values.update({"test-split": _SPLIT, "dataset-subset": ""})
            values["dataset"] = stack.enter_context(holding({_SPLIT: records}, _SPLIT))
        elif is_held(found.dataset):
            allowed = "no object of another process. Give the records as data"
            raise InvalidValue("dataset", found.dataset, allowed)
        elif not found.dataset and _reads_files(values.get("task", found.task)):
            values["dataset"] = NO_DATA  # A task only needs a name to build its model.
        config = RunConfig.of(found.items(), values)
        with _model_named(folder, config):
            yield OpenAdapter(folder, config, build_task(config.task, config), records, whole)


@contextmanager
def _model_named(folder: Path, config: RunConfig) -> Iterator[None]:
    """Say where a model that is not here was, because an adapter names no folder of a machine."""
    try:
        yield
    except InvalidValue as error:
        name = Path(config.model).name
        if error.key != "model" or not config.model or Path(config.model).is_dir():
            raise
        if config.model != read_task(folder).model:
            raise  # The user has named another one.
        if "/" in config.model and not Path(config.model).is_absolute():
            raise  # A model of a hub, with its owner.
        allowed = (
            "a model that is here. This adapter was trained on a folder, or a model, named "
            f"{name}. Say where it is: `-c model=FOLDER`"
        )
        raise InvalidValue("model", config.model, allowed) from error


def adapter_folder(adapter: Adapter) -> Path:
    """Return the folder of an adapter, or of a merged model. A run's folder has ``adapter``.

    Raises
    ------
    InvalidValue
        There is no adapter and no merged model.
    """
    given = Path(adapter) if is_path(adapter) else adapter.adapter  # type: ignore[arg-type,union-attr]
    path = given.expanduser()
    for folder in (path, path / "adapter"):
        if is_adapter(folder):
            return folder
    if (path / NAME).is_file():  # A merged model, which knows its task.
        return path
    allowed = "the folder of a run, of an adapter, or of a merged language model"
    raise InvalidValue("adapter", str(path), allowed)


def _reads_files(task: str) -> bool:
    return task in TASKS and ("dataset",) in TASKS[task].on_device


def _records(data: Any, settings: Mapping[str, Any], changes: Mapping[str, Any]) -> Dataset:
    if not is_path(data):
        return as_dataset(data, "data")
    source = str(Path(data).expanduser())
    named = {"test_split", "test-split", "data.test-split"} & changes.keys()
    split = str(settings["test-split"]) if named else _only(split_names(source), source)
    try:
        return load_split(source, split)
    except InvalidValue as error:
        key = {"dataset": "data", "split": "test-split"}.get(error.key, error.key)
        raise InvalidValue(key, error.value, error.allowed, error.near) from error


def _only(names: list[str], source: str) -> str:
    if len(names) != 1:
        allowed = f"a file, or test-split = one of the folder's splits {names}"
        raise InvalidValue("data", source, allowed)
    return names[0]
