"""The mechanisms that papers on private LoRA name, measured one by one at a size for two cores.

``python -m benchmarks.mechanisms`` measures all parts, and those that are named if some are. With
``--output`` it writes the rows of each part. ``--page`` measures nothing: it writes the tables of
docs/mechanisms.md from the committed rows, and `benchmarks.pictures` draws its pictures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import torch
from rich.console import Console

from benchmarks import (
    mechanism_costs,
    mechanism_coupling,
    mechanism_noise,
    mechanism_regression,
    mechanism_runs,
)
from benchmarks.figures import write_content
from benchmarks.mechanism_page import PAGE, RESULTS, TABLES, read, sections, written
from fedlora_flwr.files import replace_file
from fedlora_flwr.terminal import show_line

Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One thing to measure.

    Parameters
    ----------
    about : str
        What it is.
    full, quick : Callable[[], Iterable[Row]]
        Measure it, and measure it in small.
    """

    about: str
    full: Callable[[], Iterable[Row]]
    quick: Callable[[], Iterable[Row]]

    @classmethod
    def of(cls, about: str, measure: Callable[[Any], Iterator[Row]], full: Any, quick: Any) -> Part:
        """Bind a measurement to its two sizes."""
        return cls(about, partial(measure, full), partial(measure, quick))


PARTS: Mapping[str, Part] = {
    "noise": Part.of(
        "the noise in the product, by formula and by the real step",
        mechanism_noise.measure, mechanism_noise.Size(), mechanism_noise.QUICK,
    ),
    "coupling": Part.of(
        "a joint step of A and B against the sum of single ones",
        mechanism_coupling.measure, mechanism_coupling.Size(), mechanism_coupling.QUICK,
    ),
    "reconstruction": Part.of(
        "the error of known updates by round and schedule",
        mechanism_regression.measure, mechanism_regression.Size(), mechanism_regression.QUICK,
    ),
    "steps": Part.of(
        "time, peak memory and upload of each method",
        mechanism_costs.measure_rounds, mechanism_costs.Size(), mechanism_costs.QUICK,
    ),
    "aggregation": Part.of(
        "the server's step against a full SVD",
        mechanism_costs.measure_aggregation, mechanism_costs.Size(), mechanism_costs.QUICK,
    ),
    "runs": Part.of(
        "accuracy, sharpness and error of averaging of short runs",
        mechanism_runs.measure, mechanism_runs.Size(), mechanism_runs.QUICK,
    ),
}  # fmt: skip


def measure(names: Sequence[str], quick: bool, console: Console) -> dict[str, pd.DataFrame]:
    """Measure parts one after another, and print their tables."""
    found = {}
    for name in names:
        part = PARTS[name]
        begin, used = time.perf_counter(), time.process_time()
        show_line(console, f"{name}: {part.about}")
        found[name] = pd.DataFrame(part.quick() if quick else part.full())
        for table in TABLES[name].values():
            show_line(console, f"\n{table(found[name])}\n")
        found[name].attrs["seconds"] = round(time.perf_counter() - begin, 1)
        found[name].attrs["cpu_seconds"] = round(time.process_time() - used, 1)
    return found


def write(folder: Path, found: Mapping[str, pd.DataFrame], quick: bool) -> None:
    """Write the rows of each part, and how they were made."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in found.items():
        text = frame.to_csv(index=False, float_format="%.6g")
        replace_file(folder / f"{name}.csv", text.encode())
        command = f"python -m benchmarks.mechanisms {name}" + " --quick" * quick
        write_content(folder / f"{name}.json", command, {str(k): v for k, v in frame.attrs.items()})


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the mechanisms that papers on private LoRA name."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mechanisms",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    listed = "; ".join(f"{name}: {part.about}" for name, part in PARTS.items())
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{listed} (all)")
    parser.add_argument("--quick", action="store_true", help="in small, some seconds")
    parser.add_argument("--output", type=Path, help="folder for the rows")
    parser.add_argument("--page", action="store_true", help="write the page from committed rows")
    given = parser.parse_args(argv)
    if unknown := [name for name in given.parts if name not in PARTS]:
        parser.error(f"no part is called {unknown[0]!r}. Choose from {', '.join(PARTS)}")
    if given.page:
        page = written(PAGE.read_text("utf-8"), sections(read(RESULTS)))
        replace_file(PAGE, page.encode())
        return
    torch.set_num_threads(1)
    found = measure(given.parts or list(PARTS), given.quick, Console())
    if given.output is not None:
        write(given.output, found, given.quick)


if __name__ == "__main__":
    main()
