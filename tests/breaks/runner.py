"""Applies breaks one by one, each in a process of its own, and sees whether the test fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.breaks.breaks import Break, Fault

ROOT = Path(__file__).parents[2]
LIMIT = 600.0  # Seconds for one process.
ASSERTIONS = ("AssertionError", "Failed")  # pytest raises `Failed` where no error came.
CAUGHT, MISSED = "caught", "NOT caught"


@dataclass(frozen=True)
class Report:
    """What pytest said of one phase of a test.

    Parameters
    ----------
    test : str
        Id of the test.
    phase : str
        ``"setup"``, ``"call"`` or ``"teardown"``.
    outcome : str
        ``"passed"``, ``"failed"`` or ``"skipped"``.
    error : str
        Name of the error's type; empty without an error.
    """

    test: str
    phase: str
    outcome: str
    error: str


@dataclass(frozen=True)
class Ran:
    """What a process of pytest did.

    Parameters
    ----------
    status : int
        Its exit status; negative if it was killed.
    reports : Sequence[Report]
        What it said of each phase of each test.
    seconds : float
        How long it took.
    output : str
        What it printed.
    """

    status: int
    reports: Sequence[Report]
    seconds: float
    output: str

    def passed(self, test: str) -> bool:
        """Tell whether a test ran and passed."""
        mine = [r for r in self.reports if r.test == test]
        return any(r.phase == "call" for r in mine) and all(r.outcome == "passed" for r in mine)


@dataclass(frozen=True)
class Row:
    """What was found of one break.

    Parameters
    ----------
    name, fault, test : str
        Those of the break.
    found : str
        ``"caught"`` or ``"NOT caught"``.
    why : str
        Why it doesn't count as caught; empty if it does.
    seconds : float
        How long the test took with the break, its collection included.
    """

    name: str
    fault: str
    test: str
    found: str
    why: str
    seconds: float


class _Plugin:
    """Applies a break once all tests are imported, and notes what they do."""

    def __init__(self, fault: Fault | None) -> None:
        self._fault = fault
        self._patch = pytest.MonkeyPatch()
        self.reports: list[Report] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self) -> None:
        """Break the package: names that tests have imported are there by now."""
        if self._fault is not None:
            self._fault(self._patch)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Note the error's type, which the report itself only has as a text."""
        report = yield
        error = "" if call.excinfo is None else _name(call.excinfo.value)
        self.reports.append(Report(item.nodeid, report.when, report.outcome, error))
        return report


def _name(error: BaseException) -> str:
    """Return the name of an error's type; of a group, the name that all of its errors share."""
    if isinstance(error, BaseExceptionGroup):
        names = {_name(each) for each in error.exceptions}
        return names.pop() if len(names) == 1 else type(error).__name__
    return "AssertionError" if isinstance(error, AssertionError) else type(error).__name__


class Bench:
    """Runs tests in forks of this process, which has imported what takes long to import.

    Parameters
    ----------
    folder : Path
        A folder for what the processes leave behind.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cache = folder / "cache"
        self._count = 0

    def start(self, tests: Sequence[str], fault: Fault | None) -> Job:
        """Start a fork that runs tests, with a fault or without one.

        Only forks without a fault write to the common cache. Each fork with one has a copy: what is
        worked out by broken code must not be read by others.
        """
        self._count += 1
        own = self._folder / str(self._count)
        own.mkdir()
        cache = self._cache
        if fault is not None:
            cache = own / "cache"
            if self._cache.exists():
                shutil.copytree(self._cache, cache)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _child(tests, fault, own, cache)
        return Job(pid, own, time.monotonic())


@dataclass(frozen=True)
class Job:
    """A process at work.

    Parameters
    ----------
    pid : int
        The process.
    folder : Path
        Where it writes its output and its reports.
    started : float
        When it began, on the monotonic clock.
    """

    pid: int
    folder: Path
    started: float

    def ended(self) -> Ran | None:
        """Return what the process did, or None while it is at work. One that hangs is killed."""
        seconds = time.monotonic() - self.started
        if seconds > LIMIT:
            os.kill(self.pid, signal.SIGKILL)
        pid, status = os.waitpid(self.pid, 0 if seconds > LIMIT else os.WNOHANG)
        if not pid:
            return None
        file = self.folder / "reports.json"
        held = json.loads(file.read_text()) if file.exists() else []
        output = (self.folder / "output").read_text(errors="replace")
        shutil.rmtree(self.folder)
        code = os.waitstatus_to_exitcode(status)
        return Ran(code, [Report(**each) for each in held], seconds, output)


def _child(tests: Sequence[str], fault: Fault | None, own: Path, cache: Path) -> None:
    """Run pytest in a fork, and end it without any of the parent's handlers."""
    status = 3
    try:
        with (own / "output").open("wb") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        # An example that broken code has failed on is of no use to others.
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(own / "hypothesis")
        plugin = _Plugin(fault)
        options = ["-n", "0", "-q", "--durations=0", "--rootdir", str(ROOT), "-m", ""]
        options += ["--hypothesis-seed", "0"]
        options += ["-o", f"cache_dir={cache}", "--basetemp", str(own / "files")]
        status = int(pytest.main([*options, *tests], plugins=[plugin]))
        (own / "reports.json").write_text(json.dumps([asdict(r) for r in plugin.reports]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(breaks: Sequence[Break], workers: int, told: Callable[[str], Any] = print) -> Iterator[Row]:
    """Run each break's test, first without and then with the break.

    Parameters
    ----------
    breaks : Sequence[Break]
        The breaks.
    workers : int
        How many processes at a time.
    told : callable
        Takes what there is to say between the rows.

    Yields
    ------
    Row
        One for each break, in the order in which they end.
    """
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        bench, tests = Bench(Path(folder)), list(dict.fromkeys(one.test for one in breaks))
        told(f"Running {len(tests)} tests without a break.")
        # In one process after another: they fill one cache.
        (sound,) = _each(bench, [(tests, None, None)], 1)
        good = {test for test in tests if sound[1].passed(test)}
        told(f"{len(good)} of {len(tests)} pass without a break, {sound[1].seconds:.0f} s.")
        if len(good) < len(tests):
            told(sound[1].output)
        work = [([one.test], one.apply, one) for one in breaks]
        for one, ran in _each(bench, work, workers):
            assert one is not None
            why = "its test fails without the break, too" if one.test not in good else ""
            yield _row(one, ran, why or not_caught(ran))


def _each(
    bench: Bench, work: Iterable[tuple[Sequence[str], Fault | None, Break | None]], workers: int
) -> Iterator[tuple[Break | None, Ran]]:
    """Yield what each process did; at most ``workers`` are at work."""
    waiting, going = list(work), list[tuple[Break | None, Job]]()
    while waiting or going:
        while waiting and len(going) < workers:
            tests, fault, one = waiting.pop(0)
            going.append((one, bench.start(tests, fault)))
        for entry in list(going):
            if (ran := entry[1].ended()) is not None:
                going.remove(entry)
                yield entry[0], ran
        time.sleep(0.02)


def _row(one: Break, ran: Ran, why: str) -> Row:
    return Row(one.name, one.fault, one.test, MISSED if why else CAUGHT, why, round(ran.seconds, 1))


def not_caught(ran: Ran) -> str:
    """Say why a break was not caught; return nothing if its test failed as it has to."""
    wrong = [r for r in ran.reports if r.outcome != "passed"]
    if ran.status < 0:
        return "its process was killed"
    if not ran.reports:
        return "its test did not run: " + (ran.output.strip().splitlines() or ["no output"])[-1]
    if not wrong:
        return "its test passes"
    first = wrong[0]
    if first.phase != "call" or first.outcome != "failed" or ran.status != 1:
        return f"its test was {first.outcome} in its {first.phase}: {first.error}"
    if first.error not in ASSERTIONS:
        return f"its test ended with {first.error}, not with an assertion"
    return ""
