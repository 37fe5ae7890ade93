"""``python -m tests.breaks``: break the promise in each way that is known, and see it noticed."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

# One thread: a fork has only the thread that forked.
os.environ["OMP_NUM_THREADS"] = "1"

from rich.console import Console

from fedlora_flwr.terminal import Table, show
from tests.breaks.breaks import BREAKS, Break
from tests.breaks.runner import CAUGHT, Row, run

THEMES = ("step", "noise", "accounting", "leaving", "sums", "kept")
SLOW = ("torch", "peft", "opacus.optimizers", "timm", "flwr.clientapp", "hypothesis", "scipy.stats")


def every_break() -> list[Break]:
    """Return all breaks."""
    for theme in THEMES:
        importlib.import_module(f"tests.breaks.{theme}")
    return BREAKS


def main(arguments: Sequence[str], breaks: Sequence[Break] | None = None) -> int:
    """Run breaks and print what was found of each; return the exit code.

    Parameters
    ----------
    arguments : Sequence[str]
        The words of the command line.
    breaks : Sequence[Break], optional
        The breaks to choose from; by default all.
    """
    asked = _asked(arguments)
    for name in SLOW:
        importlib.import_module(name)
    every = every_break() if breaks is None else list(breaks)
    if unknown := sorted(set(asked.only) - {one.name for one in every}):
        print(f"There is no break of the name {unknown[0]!r}.", file=sys.stderr)
        return 2
    chosen = [one for one in every if one.name in asked.only or not asked.only]
    began, found = time.monotonic(), dict[str, Row]()
    for row in run(chosen, asked.workers):
        found[row.name] = row
        why = f": {row.why}" if row.why else ""
        print(f"[{len(found)}/{len(chosen)}] {row.name}: {row.found}{why}", flush=True)
    rows = [found[one.name] for one in chosen]
    if asked.json:
        Path(asked.json).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    cells = [(row.name, row.found, f"{row.seconds:.1f}", row.fault, row.test) for row in rows]
    print()
    show(Console(), Table(("break", "found", "s", "what it does", "test"), cells, "<<><<"))
    caught = sum(row.found == CAUGHT for row in rows)
    print(f"\n{caught} of {len(rows)} breaks are caught, {time.monotonic() - began:.0f} s.")
    return 0 if caught == len(rows) else 1


def _asked(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.breaks", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run these breaks")
    parser.add_argument("--workers", type=int, choices=(1, 2), default=1, help="processes at once")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to a file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
