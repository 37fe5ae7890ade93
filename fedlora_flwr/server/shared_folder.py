"""Sees to it that all machines of a Ray cluster keep one ledger."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from fedlora_flwr.config.state import state_folder_of
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.files import private_folder, replace_file

CONNECTS, ANSWERS = 60.0, 120.0
"""Seconds in which Flower connects to Ray, and in which a machine answers."""
_TICK = 0.05


class SharedFolder:
    """The folder of a simulation's ledger, which each machine of a Ray cluster has to see.

    Any machine may serve a client in any round. If each had a ledger of its own, none would know
    all releases of a client, and its ε would be too low. So the server leaves a file in the folder
    as long as the run lasts, and asks each machine for it before the first round, and each machine
    that has joined since after every round.

    Parameters
    ----------
    state_dir : str
        ``state-dir``. If it is empty, each machine has a folder in its own user's data folder.

    Raises
    ------
    InvalidValue
        A machine does not see the file; raised on entry and by `after_round`.
    """

    def __init__(self, state_dir: str) -> None:
        self._state_dir = state_dir
        self._name = f".run-{secrets.token_hex(16)}"
        self._seen: set[str] = set()

    def __enter__(self) -> SharedFolder:
        """Leave the file, and ask each machine for it."""
        replace_file(private_folder(state_folder_of(self._state_dir)) / self._name, b"")
        try:
            _wait_for_ray()
            self._check()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the file."""
        (state_folder_of(self._state_dir) / self._name).unlink(missing_ok=True)

    def after_round(self, row: Mapping[str, object]) -> None:  # noqa: ARG002
        """Ask each machine that has joined the cluster since."""
        self._check()

    def seen_by(self, worker: Any) -> Any:
        """Ask a Ray worker whether its machine sees the file; return the answer to wait for."""
        return worker.__ray_call__.remote(_worker_sees, self._state_dir, self._name)

    def _check(self) -> None:
        nodes = _machines()
        if len(nodes) < 2:
            return
        blind = self._without_it({n: at for n, at in nodes.items() if n not in self._seen})
        if blind:
            raise InvalidValue(
                "state-dir",
                self._state_dir or str(state_folder_of("")),
                "a folder on storage that all machines of the Ray cluster share, because it holds "
                f"the ledger, but no file of this run is there on {', '.join(sorted(blind))}",
            )
        self._seen |= nodes.keys()

    def _without_it(self, nodes: Mapping[str, str]) -> list[str]:
        """Return the addresses of machines that do not see the file, or that do not say."""
        import ray
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task = ray.remote(num_cpus=0)(_sees)
        asked = {
            node: task.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(self._state_dir, self._name)
            for node in nodes
        }
        blind = []
        for node, answer in asked.items():
            try:
                if not ray.get(answer, timeout=ANSWERS):
                    blind.append(nodes[node])
            except (RayError, TimeoutError):
                if node in _machines():  # It did not just leave the cluster.
                    blind.append(nodes[node])
        return blind


def _sees(state_dir: str, name: str) -> bool:
    """Tell whether this machine sees a file in the ledger's folder."""
    return (state_folder_of(state_dir) / name).exists()


def _worker_sees(_: object, state_dir: str, name: str) -> bool:
    """Do the same in a worker that has started."""
    return _sees(state_dir, name)


def _wait_for_ray() -> None:
    """Wait for Flower, which starts the ServerApp, and then connects to Ray in another thread."""
    import ray

    until = time.monotonic() + CONNECTS
    while not ray.is_initialized() and time.monotonic() < until:
        time.sleep(_TICK)


def _machines() -> dict[str, str]:
    """Return the address of each machine of the Ray cluster by its id."""
    import ray

    if not ray.is_initialized():  # Flower reports by itself that it cannot connect.
        return {}
    return {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]}
