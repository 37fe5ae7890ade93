"""All that this package relies on inside Flower to keep other code off a device.

Flower has no setting for this: by default a device imports the code that the server ships. Flower's
SuperNode starts a SuperExec, which starts a program for each message by its name. That program
unpacks the app bundle and imports the app from it. This module replaces the last two steps. Each
function checks that Flower still works this way, and refuses a version that does not.

Source: flwr 1.42, ``supercore/superexec/executor/subprocess_executor.py`` and
``supernode/runtime/run_clientapp.py``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, distribution
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

from fedlora_flwr.errors import CannotStart
from fedlora_flwr.processes import uncollected

if TYPE_CHECKING:
    from flwr.clientapp.typing import ClientAppCallable

SUPERNODE, SUPEREXEC, CLIENT = "flower-supernode", "flower-superexec", "flwr-clientapp"
_RUNTIME = "flwr.supernode.runtime.run_clientapp"
_EXECUTOR = "flwr.supercore.superexec.executor"
Loader = Callable[[bytes], "ClientAppCallable"]
"""Returns the app that serves a message, given the content of the run's bundle."""


class NotSealed(CannotStart):
    """A device would run code that is not installed on it, and is not started."""


class OtherFlower(NotSealed):
    """The installed version of Flower starts clients in a way that the package does not know.

    Parameters
    ----------
    what : str
        What is missing in this version.
    """

    def __init__(self, what: str) -> None:
        version = distribution("flwr").version
        super().__init__(
            f"flwr {version} cannot be kept from running a server's code, because {what}",
            "install flwr 1.42 on this device",
        )

    def __reduce__(self) -> tuple[type[NotSealed], tuple[str, str]]:
        """Rebuild from ``what`` and ``fix``, so that the error can cross processes."""
        return NotSealed, (self.what, self.fix)


def programs() -> dict[str, EntryPoint]:
    """Return every program that Flower installs, by its name.

    Raises
    ------
    OtherFlower
        A program that a device needs is missing.
    """
    points = distribution("flwr").entry_points.select(group="console_scripts")
    found = {point.name: point for point in points}
    for name in (SUPERNODE, SUPEREXEC, CLIENT):
        if name not in found:
            raise OtherFlower(f"it has no program {name}")
    return found


def program(name: str) -> Callable[[], object]:
    """Import one of Flower's programs, and none of those beside it.

    Flower imports all programs of a package together. Each is a module of its own name, and takes
    up to half a second. This process does not become another program, so it leaves them out.

    Parameters
    ----------
    name : str
        The program's name.

    Returns
    -------
    callable
        The program.

    Raises
    ------
    OtherFlower
        There is no such program.
    """
    found = programs()
    if name not in found:
        raise OtherFlower(f"it has no program {name}")
    own = found[name]
    for other in found.values():
        if other.module == own.module and other.attr != own.attr:
            module = ModuleType(f"{other.module}.{other.attr}")
            setattr(module, other.attr, _never)
            sys.modules.setdefault(module.__name__, module)
    with uncollected():
        run: Callable[[], object] = own.load()
    return run


def started_by_superexec() -> set[str]:
    """Return the names under which SuperExec looks for the programs that it starts.

    SuperExec's own executor runs, with a recorder in place of the module that starts processes.

    Raises
    ------
    OtherFlower
        It does not start a client's program by its bare name.
    """
    commands: list[list[str]] = []
    recorder = SimpleNamespace(
        Popen=lambda arguments, **_: commands.append(list(arguments)), DEVNULL=None
    )
    try:
        executor: Any = importlib.import_module(f"{_EXECUTOR}.subprocess_executor")
        kinds: Any = importlib.import_module("flwr.supercore.constant").TaskType
        real, executor.subprocess = executor.subprocess, recorder
        try:
            for kind in kinds:
                executor.SubprocessExecutor().launch(_execution(kind))
        finally:
            executor.subprocess = real
    except Exception as error:
        raise OtherFlower(f"its SuperExec works in another way ({error})") from error
    names = {command[0] for command in commands}
    if len(commands) != len(kinds) or CLIENT not in names or any("/" in name for name in names):
        raise OtherFlower(f"its SuperExec starts {', '.join(sorted(names)) or 'nothing'}")
    return names


def _execution(kind: object) -> object:
    types: Any = importlib.import_module(f"{_EXECUTOR}.types")
    return types.ExecutionSpec(
        task_type=kind, runtime_api_address="127.0.0.1:1", token=str(kind), insecure=True,
        root_certificates_path=None, runtime_dependency_install=False, parent_pid=None,
        suppress_output=False, task_id=1,
    )  # fmt: skip


def handle_with(load: Loader) -> Callable[[], object]:
    """Replace Flower's handling of an app bundle for the rest of this process.

    Nothing in a bundle is written to the disk, put on the import path, imported or installed. The
    app that `load` returns serves the message.

    Parameters
    ----------
    load : callable
        Called once with the bundle's content. An error that it raises becomes an error reply.

    Returns
    -------
    callable
        Flower's own ``flwr-clientapp``, which reads its command line and answers one message.

    Raises
    ------
    OtherFlower
        A function that has to be replaced is not where it is expected.
    """
    loading = _Loading(load)
    stand_ins: Iterable[tuple[str, str, Callable[..., object]]] = (
        ("flwr.supercore.object_ref", "load_app", _never),
        ("flwr.supercore.superexec.dependency_installer", "install_app_dependencies", _never),
        ("flwr.cli.install", "install_from_fab", loading.look_at),
        ("flwr.clientapp.utils", "get_load_client_app_fn", loading.loader),
    )
    # Each is replaced in the module that defines it. The runtime is imported afterwards, so it gets
    # the replacement.
    for module, name, stand_in in stand_ins:
        owner = module_of(module)
        if not callable(getattr(owner, name, None)):
            raise OtherFlower(f"{module} has no {name}")
        setattr(owner, name, stand_in)
    runtime = module_of(_RUNTIME)
    for _, name, stand_in in stand_ins:
        if name != "load_app" and getattr(runtime, name, None) != stand_in:
            raise OtherFlower(f"{_RUNTIME} does not use {name}")
    return program(CLIENT)


class _Loading:
    """Replaces two of Flower's functions, the first of which is called before the second."""

    def __init__(self, load: Loader) -> None:
        self._load = load
        self._app: ClientAppCallable | None = None

    def look_at(self, bundle: object, *_: object, **__: object) -> None:
        """Replace the function that unpacks a bundle."""
        if not isinstance(bundle, bytes):
            raise OtherFlower("it hands over something other than the bytes of a bundle")
        self._app = self._load(bundle)

    def loader(self, *_: object, **__: object) -> Callable[..., ClientAppCallable]:
        """Replace the function that imports the app of a bundle."""

        def load(*_: object, **__: object) -> ClientAppCallable:
            if self._app is None:
                raise OtherFlower("it loads an app before this package has checked the bundle")
            return self._app

        return load


def _never(*_: object, **__: object) -> NoReturn:
    raise OtherFlower("it imports or installs parts of a bundle, or starts another program")


def module_of(name: str) -> Any:
    """Return a module of Flower's.

    Raises
    ------
    OtherFlower
        There is none of this name.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise OtherFlower(f"there is no {name}") from error
