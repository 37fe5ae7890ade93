"""Tasks by name. A task says what is learned, from which records, on which backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import signature
from typing import TYPE_CHECKING, Any, Protocol, cast

from fedlora_flwr.config.settled import CLIENTS
from fedlora_flwr.errors import InvalidValue, require
from fedlora_flwr.places import TASKS, check_task_name, load

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from fedlora_flwr.config import RunConfig
    from fedlora_flwr.data.records import Batch, Records


class Task(Protocol):
    """One learning problem: backbone, public test set, private records, loss."""

    name: str
    metric: str
    """Name of the figure that `evaluate` returns and that a run reports."""

    @property
    def lora_targets(self) -> str:
        """Default regular expression for the module names that get an adapter."""
        ...

    @property
    def head(self) -> tuple[str, ...]:
        """Names of the modules that form the task head."""
        ...

    def build_model(self) -> nn.Module:
        """Return a new pretrained model, head included, on the CPU in fp32.

        The same call gives bit-identical weights in every process.
        """
        ...

    def client_records(self, partition_id: int, num_partitions: int) -> Records:
        """Return the private records of one simulated client."""
        ...

    def test_records(self) -> Records:
        """Return the public test set that the server evaluates on."""
        ...

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of each record, shape (n,). Loss i depends on record i only."""
        ...

    def evaluate(self, model: nn.Module, records: Records) -> dict[str, float]:
        """Return metrics on ``records``: at least ``loss`` and the task's ``metric``."""
        ...


OPTIONAL: Mapping[str, str] = {
    "picture_field": "returns the name of the field of a batch that holds pictures of shape (n, "
    "channels, h, w), so that augmentation can make views of them",
    "skeleton": "returns the model without its weights on a torch device, by default 'meta', so "
    "that a forecast builds no weights",
    "largest_batch": "returns a batch of so many records of the largest shapes, so that a forecast "
    "of memory needs no records",
    "made_up_batch": "returns a batch of so many made-up records, so that a rehearsal reads no "
    "public record",
    "reading": "tells for each split which records are read and which are left out, given the "
    "number of clients",
    "client_units": "returns the number of records of each client as an array, or of users if "
    "they are the unit, given the number of clients, so that a run with many clients need not "
    "open the records of each. It counts only beside its own client_records",
    "client_values": "returns the value of the partition column that each client is made of, given "
    "the number of clients, 0 if it is not known yet, and an empty list if clients are not made of "
    "values",
    "private_reading": "tells the same about a device's private split",
    "class_names": "returns the names of the classes in the order of their numbers, for tables and "
    "model cards",
    "model_notes": "returns sentences about the model, which a forecast and the start of a run "
    "show as warnings",
    "unstated_classes": "returns the names of the private classes if only their number is "
    "configured",
    "scores": "returns each record's scores of the classes, of shape (n, classes), for figures by "
    "class",
    "labeled": "returns the records of a data set with their classes, so that an adapter is "
    "measured on other records than those of its run",
    "answers": "returns the model's `fedlora_flwr.tasks.answers.Answer` to each of some public "
    "records, so that a server compares them with the right answers",
    "predictions": "tells what a model says of each record of a data set, as columns",
    "save_model": "writes the plain model into a folder, as its own library loads it",
    "check_splits_apart": "raises an error if a public record is also private; a device evaluates "
    "only with a task that has this member",
}
"""Members that a task may have beside those of `Task`, and the purpose of each."""
TaskFactory = Callable[..., Task]
_METHODS = ("build_model", "client_records", "test_records", "losses", "evaluate")


def extras_of(name: str) -> tuple[str, ...]:
    """Return the extras that must be installed for a task, as `fedlora_flwr.errors.require` takes.

    Parameters
    ----------
    name : str
        As for `build_task`. A task of the user's own may import more; that is not known here.

    Raises
    ------
    InvalidValue
        No task has that name.
    """
    check_task_name(name)
    return TASKS[name].extras if name in TASKS else ("client",)


def required_on_device(name: str) -> tuple[tuple[str, ...], ...]:
    """Return the keys that a device's own file must have for a task.

    With these keys, every device builds a model of the same modules and shapes without opening a
    record. Private records then only decide the values of gradients.

    Parameters
    ----------
    name : str
        As for `build_task`. A task of the user's own needs nothing more than its name.

    Returns
    -------
    tuple[tuple[str, ...], ...]
        Groups of configuration keys. One key of each group must have a value other than empty text
        or 0.

    Raises
    ------
    InvalidValue
        No task has that name.
    """
    check_task_name(name)
    return TASKS[name].on_device if name in TASKS else ()


def build_task(name: str, settings: Any) -> Task:
    """Build the task called ``name``.

    Parameters
    ----------
    name : str
        A registered name; or ``module:function`` of a function or class that takes ``settings``
        or nothing, and returns a `Task`; or of an object that is one.
    settings : RunConfig
        The run configuration; a task reads its keys as attributes.

    Raises
    ------
    InvalidValue
        No task has that name, the module or function does not exist, its result is not a task, or
        ``generation-limit`` asks for answers that the task does not write.
    NotInstalled
        The task needs packages that are not installed.
    """
    require(*extras_of(name))
    known = TASKS.get(name)
    task = _made(name, _factory(known.place if known else name), settings)
    if missing := [member for member in _METHODS if not hasattr(task, member)]:
        found = f"a {type(task).__name__} without {', '.join(missing)}"
        allowed = f"module:function that returns a task. This one returns {found}"
        raise InvalidValue("task", name, allowed)
    if limit := getattr(settings, "generation_limit", 0):
        if optional(task, "answers") is None:
            allowed = f"0 where task = {name!r}, which writes no answers"
            raise InvalidValue("generation-limit", limit, allowed)
        require("generation")
    return task


def optional(task: Task, member: str) -> Callable[..., Any] | None:
    """Return one of a task's `OPTIONAL` members, or ``None`` if the task does not have it."""
    assert member in OPTIONAL
    found: Callable[..., Any] | None = getattr(task, member, None)
    return found


def client_sizes(config: RunConfig, task: Task) -> NDArray[np.int64]:
    """Return n of each simulated client: its number of records, or of users.

    A task may count (``client_units``). Where it does not, or its class has another
    ``client_records`` than the class that counts, the records of every client are opened.

    Parameters
    ----------
    config : RunConfig
        The run; its ``unit`` says what is counted.
    task : Task
        Its task.

    Returns
    -------
    NDArray[np.int64]
        Shape (clients,).

    Raises
    ------
    InvalidValue
        The records cannot be opened, or do not name their users.
    """
    import numpy as np  # To ask for keys needs no NumPy.

    from fedlora_flwr.data.users import count_units

    clients, count = config.num_clients, optional(task, "client_units")
    if count is not None and _place(task, "client_units") is _place(task, "client_records"):
        return np.asarray(count(clients), np.int64)
    each = (task.client_records(client, clients) for client in range(clients))
    return np.fromiter((count_units(config.unit, own) for own in each), np.int64, clients)


def _place(task: Task, member: str) -> object:
    """Return the object or the class whose own member a task has; None if it has another's."""
    places = (task, *type(task).__mro__)
    return next((place for place in places if member in getattr(place, "__dict__", ())), None)


def with_clients(config: RunConfig, task: Task) -> RunConfig:
    """Return a run with its number of clients, which the partitioner makes if nobody gave it.

    Parameters
    ----------
    config : RunConfig
        The run.
    task : Task
        Its task. For ``"natural-id"`` its private records are opened.

    Raises
    ------
    InvalidValue
        The records cannot be opened or split, or the task does not tell its clients.
    """
    if config.num_clients:
        return config
    from fedlora_flwr.data.splits import Split

    found = Split.of(config, 0, config.seed).listed or CLIENTS
    if config.partitioner == "natural-id" and not (found := len(client_values(config, task))):
        allowed = f"a number above 0, as task = {config.task!r} does not tell how many clients"
        raise InvalidValue("num-clients", 0, f"{allowed} it makes of the partition column")
    return replace(config, num_clients=found)


def client_values(config: RunConfig, task: Task) -> list[str]:
    """Return the value of the partition column of each simulated client.

    Parameters
    ----------
    config : RunConfig
        The run.
    task : Task
        Its task.

    Returns
    -------
    list[str]
        One value per client; empty if clients are not made of a column's values.
    """
    values = optional(task, "client_values")
    return list(values(config.num_clients)) if values else []


def check_splits_apart(task: Task) -> None:
    """Refuse a task with a public record that is also private, before a device evaluates.

    Parameters
    ----------
    task : Task
        A task with the method ``check_splits_apart()``, which raises an error if it finds such a
        record.

    Raises
    ------
    InvalidValue
        A public record is private, or a task of the user's own does not have the method.
    """
    check = optional(task, "check_splits_apart")
    if check is None:
        allowed = (
            "a task with the method check_splits_apart, which refuses public records that are also "
            "private. A device does not evaluate without it"
        )
        raise InvalidValue("task", task.name, allowed)
    check()


def reading(task: Task, num_partitions: int) -> list[str]:
    """Return sentences about the records that a task reads and leaves out.

    Parameters
    ----------
    task : Task
        A task on a data set. For a task without a method ``reading`` the list is empty.
    num_partitions : int
        Clients of a simulation.

    Raises
    ------
    InvalidValue
        A split cannot be read.
    """
    account = optional(task, "reading")
    return [line for split in account(num_partitions) for line in split.lines()] if account else []


def private_reading(task: Task) -> list[str]:
    """Return sentences about the private records that a device reads and leaves out.

    Parameters and errors are those of `reading`.
    """
    account = optional(task, "private_reading")
    return list(account().lines()) if account else []


def model_notes(task: Task) -> list[str]:
    """Return sentences on a task's model that may not be what is meant."""
    found = optional(task, "model_notes")
    return list(found()) if found else []


def class_names(task: Task) -> tuple[str, ...]:
    """Return the names of a task's classes in the order of their numbers; none without classes.

    Raises
    ------
    InvalidValue
        The private split has to tell the classes, and cannot be read.
    """
    found = optional(task, "class_names")
    return tuple(map(str, found())) if found else ()


def unstated_classes(task: Task) -> list[str]:
    """Return the names of a classifier's private classes if only their number is configured.

    Raises
    ------
    InvalidValue
        The private split cannot be read.
    """
    names = optional(task, "unstated_classes")
    return list(names()) if names else []


def _made(name: str, factory: TaskFactory, settings: Any) -> Task:
    """Call a task's class or function with the settings, or with nothing if it takes nothing."""
    try:
        parameters = signature(factory)
    except ValueError:  # A class of a compiled module may have no signature.
        return factory(settings)
    for given in ((settings,), ()):
        try:
            parameters.bind(*given)
        except TypeError:
            continue
        return factory(*given)
    allowed = f"a function or class that takes the settings or nothing. This one takes {parameters}"
    raise InvalidValue("task", name, allowed)


def _factory(place: str) -> TaskFactory:
    """Import ``module:function`` (see `fedlora_flwr.places`)."""
    found = load("task", place, "function that returns a task")
    if not isinstance(found, type) and all(hasattr(found, member) for member in _METHODS):
        return lambda: found  # An object that is a task itself.
    if not callable(found):
        raise InvalidValue("task", place, "module:function, where calling it returns a task")
    return cast(TaskFactory, found)
