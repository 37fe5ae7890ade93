"""Independent jobs, one after the other in this process or in parallel in worker processes."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children, get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import SemLock
from pathlib import Path
from typing import Protocol, TypeVar

from fedlora_flwr.errors import FedLoRAError
from fedlora_flwr.terminal import held

Job = TypeVar("Job")
Result = TypeVar("Result")
_GRACE = 2.0  # seconds in which a pool notices by itself that a worker was killed
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Execute(Protocol):
    """Maps a function over jobs. Results come in the order in which they are ready."""

    def __call__(self, function: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
        """Yield one result per job."""
        ...


class WorkerDied(FedLoRAError):
    """A worker process ended before its job did."""


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Drop a line if the disk is full. The run itself reports what it cannot write."""


def log_to_file(path: Path, first: Sequence[str] = ()) -> None:
    """Write Flower's lines to a file instead of the screen, after the lines in ``first``."""
    # Flower's first import adds a handler for the screen, so import it before removing handlers.
    importlib.import_module("flwr.common.logger")
    logger = logging.getLogger("flwr")
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    for line in first:
        logger.info("%s", line)


@contextmanager
def kept_log() -> Iterator[None]:
    """Let Flower's lines go where they went before, once the block has ended."""
    logger = logging.getLogger("flwr")
    handlers, propagate = list(logger.handlers), logger.propagate
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = handlers, propagate


@contextmanager
def executor(workers: int, log: Path) -> Iterator[Execute]:
    """Return a function that runs jobs.

    Worker processes live until the context ends, so all calls share what they have built. They are
    ended at once if the context is left with an error or this process dies.

    Parameters
    ----------
    workers : int
        Processes with one numerical thread each; 1 runs jobs in this process.
    log : Path
        The file for Flower's lines and the workers' output.

    Raises
    ------
    WorkerDied
        A worker was killed, e.g. because memory ran out.
    """
    log_to_file(log)
    if workers == 1:
        yield one_by_one
        return
    with _processes(workers, log) as pool:
        yield partial(_side_by_side, pool, _Watch(pool))


def one_by_one(function: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
    """Run jobs in this process, one after the other."""
    return map(function, jobs)


class _Watch:
    """Ends a pool of which a worker was killed while it was sending a result.

    The pool waits for the rest of the result, and the other workers wait for their turn to send.
    The rest only counts as lost once no process can send it any more.

    Parameters
    ----------
    pool : ProcessPoolExecutor
        The pool. It has no workers yet.
    """

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool, self._others = pool, set(active_children())
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Watch the workers that the pool has started."""
        if self._thread is None:
            workers = set(active_children()) - self._others
            # This process holds an end of the pipe for results as well, which it never uses.
            pipe: Connection = self._pool._result_queue._writer  # type: ignore[attr-defined]
            self._thread = threading.Thread(target=_watch, args=(workers, pipe), daemon=True)
            self._thread.start()


def _watch(workers: set[BaseProcess], pipe: Connection) -> None:
    while workers:
        wait([worker.sentinel for worker in workers])
        ended = {worker for worker in workers if not worker.is_alive()}
        if any(worker.exitcode for worker in ended):
            time.sleep(_GRACE)
            for worker in workers:
                worker.kill()
            pipe.close()
            return
        workers -= ended


def _side_by_side(
    pool: ProcessPoolExecutor,
    watch: _Watch,
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
) -> Iterator[Result]:
    with held():  # The first jobs start the processes.
        futures = [pool.submit(function, job) for job in jobs]
        watch.begin()
    return (future.result() for future in as_completed(futures))


@contextmanager
def _processes(workers: int, log: Path) -> Iterator[ProcessPoolExecutor]:
    others = set(active_children())
    # Processes are not forked, because this one may have threads and an accelerator.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (log,))
    try:
        with _one_thread():
            yield pool
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(active_children()) - others:
            child.terminate()
        if isinstance(error, BrokenProcessPool):
            raise WorkerDied(f"A worker process was killed; see {log}.") from error
        raise
    finally:
        pool.shutdown()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Give processes that start in this block one thread for their numerical libraries."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _start(log: Path) -> None:
    """Prepare a worker process."""
    with log.open("a", encoding="utf-8") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    log_to_file(log)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is gone. A pool's own workers do not do so."""
    if (parent := parent_process()) is not None:
        parent.join()
        _remember_semaphores()
        os._exit(1)


def _remember_semaphores() -> None:
    """Name the pool's semaphores to Python's resource tracker, which removes them in the end.

    The parent has named them already. If its tracker was killed before it, a new one starts here.
    """
    for thing in gc.get_objects():
        if isinstance(thing, SemLock):
            # The names have no public attribute.
            resource_tracker.register(vars(thing)["_semlock"].name, "semaphore")
