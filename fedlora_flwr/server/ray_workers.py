"""Replaces the Ray workers that die during a run, which Flower's engine would go on to use."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeAlias

from flwr.app import Context, Message

from fedlora_flwr.errors import FedLoRAError
from fedlora_flwr.strategies.reasons import WORKER_DIED

if TYPE_CHECKING:
    from fedlora_flwr.flower_internals import RayBackend

Answer: TypeAlias = tuple[Message, Context]
STARTS = 120.0
"""Seconds after the last loss in which new workers are asked for."""
_TICK, _AGAIN = 0.05, 5.0


class WorkerLost(FedLoRAError):
    """A client's worker died before the client had answered."""


class LastingWorkers:
    """Lets Flower's simulation engine give messages to living Ray workers only; see `serving`.

    Flower makes its workers once. A dead one stays in its pool, fails each message at once, and so
    takes most messages of every round from the workers that live. Here a worker that has died is
    replaced. Ray starts the new one where a CPU is free: on the same machine, or, if the machine is
    lost, when one joins. Until then the other workers serve all clients.

    The client whose worker died is a failure of the round, and its message is not given to another
    worker: it may have trained, and its ledger may have a row for that.

    Parameters
    ----------
    may_serve : callable
        Asks a new worker whether it may serve clients, e.g. `SharedFolder.seen_by`: it may run on a
        machine that has just joined. Returns the answer to wait for.
    """

    def __init__(self, may_serve: Callable[[Any], Any]) -> None:
        self._may_serve = may_serve
        self._starting: dict[Any, Any] = {}  # New workers by their answer.
        self._lost = 0  # Workers that have died, without those that were replaced.
        self._since = self._next_start = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Serve the messages of this block. Flower may have made its workers already."""
        from fedlora_flwr.flower_internals import RayBackend  # Ray is there only in simulations.

        flowers = RayBackend.process_message

        def serve(backend: RayBackend, message: Message, context: Context) -> Answer:
            return self._serve(backend, message, context)

        RayBackend.process_message = serve  # type: ignore[assignment]
        try:
            yield
        finally:
            RayBackend.process_message = flowers  # type: ignore[method-assign]

    def _serve(self, backend: RayBackend, message: Message, context: Context) -> Answer:
        """Answer one message, as Flower's own method does."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        pool: Any = backend.pool
        worker, machine = self._take(pool)
        client = str(context.node_config["partition-id"])
        try:
            asked = worker.run.remote(backend.app_fn, message, client, context)
            _, reply, updated = ray.get(asked)
        except RayTaskError:  # The client failed, and its worker lives.
            pool.pool.append(worker)
            raise
        except RayError as error:
            self._drop(worker)
            raise WorkerLost(_died_on(machine)) from error
        pool.pool.append(worker)
        return reply, updated

    def _take(self, pool: Any) -> tuple[Any, str]:
        """Wait for a living worker; return it and the address of its machine.

        Raises
        ------
        WorkerLost
            All workers are dead, and no new one has started.
        """
        while True:
            self._renew(pool)
            try:
                worker = pool.pool.pop()
            except IndexError:
                self._check_any_left(pool)
                time.sleep(_TICK)
                continue
            # A worker may have died while it was idle. No client has to pay for that.
            if machine := _machine(worker):
                return worker, machine
            self._drop(worker)

    def _drop(self, worker: Any) -> None:
        """Count a worker that has died."""
        import ray

        ray.kill(worker)  # Its machine may only be out of reach, and it may go on.
        with self._lock:
            self._lost, self._since = self._lost + 1, time.monotonic()

    def _renew(self, pool: Any) -> None:
        """Take over the new workers that have started, and ask Ray for those that are missing."""
        import ray
        from ray.exceptions import RayError

        with self._lock:
            asked = list(self._starting)
            for answer in ray.wait(asked, num_returns=len(asked), timeout=0)[0] if asked else []:
                worker = self._starting.pop(answer)
                with suppress(RayError):  # Ray may have chosen the machine that is being lost.
                    if ray.get(answer):
                        pool.pool.append(worker)
                        self._lost -= 1
                    else:
                        ray.kill(worker)
            now = time.monotonic()
            if self._next_start <= now < self._since + STARTS:
                for _ in range(self._lost - len(self._starting)):
                    worker = pool.create_actor_fn()
                    self._starting[self._may_serve(worker)] = worker
                    self._next_start = now + _AGAIN

    def _check_any_left(self, pool: Any) -> None:
        with self._lock:
            if self._lost < pool.num_actors or time.monotonic() < self._since + STARTS:
                return
        raise WorkerLost(
            f"no Ray worker is left, and no new one has started in {STARTS:g} s. Free memory, or "
            "start the cluster's machines again, and continue the run"
        )


def _machine(worker: Any) -> str:
    """Return the address of a worker's machine; empty if the worker is dead."""
    import ray
    from ray.exceptions import RayError

    try:
        return str(ray.get(worker.__ray_call__.remote(_on)))
    except RayError:
        return ""


def _on(_: Any) -> str:
    """Return the address of the machine that runs this worker."""
    import ray

    return str(ray.util.get_node_ip_address())


def _died_on(machine: str) -> str:
    """Say that a worker died; in a cluster of several machines, on which of them."""
    import ray

    if len(ray.nodes()) < 2:
        return WORKER_DIED
    return f"its worker process on {machine} died: killed, out of memory, or lost with the machine"
