"""Tables, progress bars, errors and signals, as all commands of the terminal handle them."""

from __future__ import annotations

import signal
import sqlite3
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, get_type_hints

import click
import typer
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from typer.core import TyperArgument, TyperGroup
from typer.models import ArgumentInfo

from fedlora_flwr.errors import FedLoRAError, NotInstalled, either, near_names, one_line
from fedlora_flwr.files import FileTrouble, append, data_folder, private_folder, to_json
from fedlora_flwr.operating_system import ENDING, blocked

_GAP = 2  # Spaces between two columns.
_LEAST_TEXT = 20  # Smallest width of wrapped text, in characters.
_NAME = 8  # Smallest width of the names in `show_lines`, in characters.


@dataclass(frozen=True)
class Table:
    """A table for people: one line per row in a pipe or a file; on a terminal, fitted to its width.

    Parameters
    ----------
    heads : Sequence[str]
        Names of the columns; empty for a table without a header.
    rows : Sequence[Sequence[str]]
        Cells.
    align : str
        For each column ``"<"`` (text) or ``">"`` (numbers).
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: str

    def lines(self, width: int | None = None) -> list[str]:
        """Return the table as lines.

        No text is cut. In a table that is too wide, the last column wraps if it is text and has
        enough room. Otherwise the table is split into parts, one below the other, and each part
        repeats the first column.

        Parameters
        ----------
        width : int, optional
            Width of the terminal in characters; by default every row is one line.
        """
        given = [self.heads, *self.rows] if self.heads else list(self.rows)
        if not given:
            return []
        every = [[" ".join(cell.splitlines()) for cell in row] for row in given]
        widths = [max(map(cell_len, column)) for column in zip(*every, strict=True)]
        *most, last = widths
        room = 0 if width is None else width - sum(most) - _GAP * len(most)
        if width is None or room >= last:
            return [line for row in every for line in self._fitted(row, widths, last)]
        if self.align[-1] == "<" and (room >= _LEAST_TEXT or len(widths) == 1):
            return [line for row in every for line in self._fitted(row, widths, max(room, 1))]
        if len(widths) <= 2:  # It cannot be split into parts, so the terminal wraps the lines.
            return self.lines()
        return self._parts(widths, width)

    def _fitted(self, row: Sequence[str], widths: Sequence[int], room: int) -> list[str]:
        """Return the lines of a row whose last cell is at most ``room`` characters wide."""
        *cells, last = row
        start = ""
        for cell, size, side in zip(cells, widths, self.align, strict=False):
            blanks = " " * (size - cell_len(cell))
            start += (cell + blanks if side == "<" else blanks + cell) + " " * _GAP
        if self.align[-1] == ">":
            return [start + " " * (widths[-1] - cell_len(last)) + last]
        wrapped = textwrap.wrap(last, room, break_long_words=False, break_on_hyphens=False)
        if cell_len(last) <= room or not wrapped:
            return [(start + last).rstrip()]
        inset = " " * cell_len(start)
        return [start + wrapped[0], *(inset + line for line in wrapped[1:])]

    def _parts(self, widths: Sequence[int], width: int) -> list[str]:
        """Return the lines of several tables, each with the first column and others that fit."""
        parts: list[list[int]] = []
        for column in range(1, len(widths)):
            taken = [0, *(parts[-1] if parts else ()), column]
            if parts and sum(widths[i] + _GAP for i in taken) - _GAP <= width:
                parts[-1].append(column)
            else:
                parts.append([column])
        lines: list[str] = []
        for part in parts:
            columns = [0, *part]
            table = Table(
                [self.heads[i] for i in columns] if self.heads else (),
                [[row[i] for i in columns] for row in self.rows],
                "".join(self.align[i] for i in columns),
            )
            lines += [*([""] if lines else []), *table.lines(width)]
        return lines


def show(console: Console, table: Table) -> None:
    """Print a table."""
    for line in table.lines(console.width if console.is_terminal else None):
        show_line(console, line)


def show_lines(console: Console, pairs: Iterable[tuple[str, str]]) -> None:
    """Print lines that each start with a name, e.g. ``Privacy   ε ≤ 8``."""
    rows = [(name.ljust(_NAME), text) for name, text in pairs]
    show(console, Table((), rows, "<<"))


def show_line(console: Console, line: str) -> None:
    """Print a line unchanged: without markup or color, not wrapped and not cut."""
    console.print(Text(line), soft_wrap=True)


def say_loading() -> None:
    """Say on a terminal that a command has begun, since its imports and its model take long."""
    console = Console(stderr=True)
    if console.is_terminal:
        show_line(console, "Loading …")


def show_json(value: Any) -> None:
    """Print a value as JSON; numbers that are not finite are null."""
    print(to_json(value, indent=2))


class Interrupted(KeyboardInterrupt):
    """A signal asks this process to end.

    Parameters
    ----------
    number : int
        Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


class Bar(Progress):
    """A progress bar with a line of text below it, which is never cut.

    Parameters
    ----------
    console : Console
        The console that shows it.
    what : str
        Name of the counted steps, e.g. ``"round"``.
    remaining : bool (default: False)
        Whether to show the remaining time, estimated from all steps so far.
    """

    def __init__(self, console: Console, what: str, remaining: bool = False) -> None:
        columns: list[ProgressColumn] = [
            TextColumn(what), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn()
        ]  # fmt: skip
        if remaining:
            columns += [TextColumn("left"), TimeRemainingColumn()]
        # A step may take seconds or hours, so the speed is estimated from all steps so far.
        super().__init__(*columns, console=console, speed_estimate_period=1e9)
        self._state = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        """Yield the bar and the line below it."""
        if self.tasks:
            yield self.make_tasks_table(self.tasks)
            yield Text(self._state)

    def stop(self) -> None:
        """Stop the display, if it has been started."""
        if self.tasks:
            super().stop()

    def to(self, done: int, total: int, state: str) -> None:
        """Show that ``done`` of ``total`` steps are over, and the result of the last one."""
        self._state = state
        if not self.tasks:
            self.add_task("", total=total, completed=done)
            self.start()
        # A comparison learns only while it runs how many runs there will be.
        self.update(self.tasks[0].id, total=total, completed=done, refresh=True)


@contextmanager
def counted(
    what: str, progress: bool | None = None, console: Console | None = None
) -> Iterator[Callable[[int, int, str], None]]:
    """Show how far work is; yield a function of the steps done, all steps, and the last result.

    It is a bar in a terminal, and in a notebook that has ipywidgets. Elsewhere it is a line per
    step.

    Parameters
    ----------
    what : str
        Name of the counted steps, e.g. ``"round"``.
    progress : bool, optional
        Whether it is shown; by default in a terminal and in a notebook.
    console : Console, optional
        The console; by default that of stderr.
    """
    shown = console or Console(stderr=True)
    moves = shown.is_terminal or (shown.is_jupyter and find_spec("ipywidgets") is not None)
    wanted = shown.is_terminal or shown.is_jupyter if progress is None else progress
    bar = Bar(shown, what, remaining=True)

    def tell(done: int, total: int, state: str) -> None:
        if wanted and moves:
            bar.to(done, total, state)
        elif wanted:
            show_line(shown, f"{what} {done}/{total}: {state}")

    try:
        yield tell
    finally:
        bar.stop()


class Commands(TyperGroup):
    """A group of commands that all run under `guard`, and whose arguments are explained."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for command in self.commands.values():
            _explain_arguments(command)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the named command; for an unknown name, end with an error that suggests commands."""
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            near = near_names(args[0], self.list_commands(ctx))
            hint = f" Did you mean {either(near)}?" if near else ""
            ctx.fail(f"There is no command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was named."""
        return guard(lambda: super(Commands, self).invoke(ctx))


def _explain_arguments(command: click.Command) -> None:
    """Give a command's arguments the help that Typer loses with click 8.5, which has its own."""
    hints = get_type_hints(command.callback, include_extras=True) if command.callback else {}
    for argument in command.params:
        for told in getattr(hints.get(argument.name or ""), "__metadata__", ()):
            if isinstance(argument, TyperArgument) and isinstance(told, ArgumentInfo):
                argument.help = told.help


def guard(work: Callable[[], Any]) -> Any:
    """Run ``work``, and turn every error into one message and exit code 1.

    All signals that ask a process to end, including that of a closed terminal, end the work as
    Ctrl-C does, so that it can clean up. The exit code is then 128 plus the signal's number.
    """
    with _handlers(_interrupt):
        try:
            return work()
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise  # Wrong usage, or an intended end.
        except BrokenPipeError:  # The reader of the output has closed it.
            raise
        except Exception as error:
            raise _ended(f"Error: {told(error)}", 1) from None
        except KeyboardInterrupt as error:
            number = error.number if isinstance(error, Interrupted) else signal.SIGINT
            raise _ended("Interrupted.", 128 + number) from None


def told(error: Exception, log: Path | None = None) -> str:
    """Describe an error to the user; the traceback of an unexpected error goes to a file.

    Parameters
    ----------
    error : Exception
        The error that ended the work.
    log : Path, optional
        File for the traceback; by default ``errors.log`` in this package's data folder.
    """
    error = NotInstalled.of(error) or error
    if isinstance(error, FedLoRAError):
        return str(error)
    if isinstance(error, OSError | sqlite3.Error):
        return str(FileTrouble.of(error))
    path, kept = log or data_folder() / "errors.log", "could not be written to"
    with suppress(FileTrouble):
        private_folder(path.parent)
        append(path, "".join(traceback.format_exception(error)).encode())
        kept = "is in"
    return (
        f"This was not expected: {type(error).__name__}: {one_line(error)}. It is a fault of the "
        f"program. The traceback {kept} {path}; please report it."
    )


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore signals while the process cleans up; the code inside must end in any case."""
    with _handlers(lambda *_: None):
        yield


@contextmanager
def held() -> Iterator[None]:
    """Delay signals while a process is started, so that it gets all of its instructions.

    A terminal sends Ctrl-C to all of its processes. A process that is started here does not get it;
    it ends when this process ends.
    """
    waiting: list[int] = []
    with _handlers(lambda number, _: waiting.append(number)), blocked(signal.SIGINT):
        yield
    for number in waiting[:1]:
        signal.raise_signal(number)


@contextmanager
def _handlers(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Handle signals that end a process, except for signals that are ignored, e.g. by nohup."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {sign: signal.getsignal(sign) for sign in ENDING}
    taken = [sign for sign in ENDING if before[sign] not in (signal.SIG_IGN, None)]
    try:
        for sign in taken:
            signal.signal(sign, handler)
        yield
    finally:
        for sign in taken:
            signal.signal(sign, before[sign])


def _interrupt(number: int, _: FrameType | None) -> None:
    raise Interrupted(number)


def _ended(text: str, code: int) -> typer.Exit:
    show_line(Console(stderr=True), text)
    return typer.Exit(code)
