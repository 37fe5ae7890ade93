"""``python -m benchmarks.soak``: kill processes again and again, and compare what is left.

The first part is a run on one machine, the second a fleet of devices. A process that is drawn from
all of them gets SIGKILL after a drawn time, and the run has to come to the end that it would have
had anyway. Nothing may be left on the machine: no process, open file, temporary file, or shared
memory.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.marked import command_of, holders, marked
from benchmarks.soak_fleet import FleetChaos
from benchmarks.soak_simulation import SimulationChaos
from fedlora_flwr.environment import machine, versions
from fedlora_flwr.files import write_json
from fedlora_flwr.terminal import show_lines

RESULT = Path(__file__).parent / "results" / "soak.json"
SHARED_MEMORY = Path("/dev/shm")
KEPT = ("torchinductor_", "ray")
"""What torch and Ray keep of each run, also where nothing is killed: a cache, and logs."""
Say = Callable[[str], object]
Part = Callable[[Path, str, Say], dict[str, Any]]


def soaked(part: Part, say: Say) -> dict[str, Any]:
    """Do one part in a folder of its own; add what it took and what it left."""
    before, started, mark = _shared_memory(), time.monotonic(), secrets.token_hex(8)
    folder = Path(tempfile.mkdtemp(prefix="fedlora-soak-")).resolve()
    try:
        result = part(folder, mark, say)
    except BaseException:
        say(f"the logs are in {folder}")
        raise
    temporary = [p for p in (folder / "tmp").glob("*") if not p.name.startswith(KEPT)]
    result["left over"] = {
        "processes": [command_of(process)[:200] for process in marked(mark)],
        "open files": [command_of(process)[:200] for process in holders(folder)],
        "temporary files": sorted(path.name for path in temporary),
        "shared memory": sorted(_shared_memory() - before),
    }
    shutil.rmtree(folder)
    return {**result, "seconds": round(time.monotonic() - started)}


def _shared_memory() -> set[str]:
    # Folders are those of other programs: what processes share are files.
    return {path.name for path in SHARED_MEMORY.glob("*") if path.is_file()}


def parts(options: argparse.Namespace) -> dict[str, Part]:
    """Return the parts by name."""

    def simulation(folder: Path, mark: str, say: Say) -> dict[str, Any]:
        return SimulationChaos(
            folder, mark, options.rounds, options.kills, options.seed, say, options.clients
        ).result()

    def fleet(folder: Path, mark: str, say: Say) -> dict[str, Any]:
        return FleetChaos(
            folder, mark, options.fleet_rounds, options.fleet_kills, options.seed, say
        ).result()

    return {"simulation": simulation, "fleet": fleet}


def verdict(name: str, result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the lines that sum up a part."""
    killed = ", ".join(f"{kind} {count}" for kind, count in sorted(result["killed"].items()))
    yield name, f"{result['kills']} kills ({killed}) in {result['seconds']} s"
    failed = [check for check, holds in result["checks"].items() if not holds]
    yield "Checks", f"failed: {'; '.join(failed)}" if failed else "all hold"
    left = [thing for things in result["left over"].values() for thing in things]
    yield "Left over", "; ".join(left) or "nothing"


def main(argv: Sequence[str] | None = None) -> None:
    """Kill processes again and again, and compare what is left."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=main.__doc__)
    parser.add_argument("--part", choices=("simulation", "fleet"), help="only this part")
    parser.add_argument("--rounds", type=int, default=200, help="rounds of the simulation")
    parser.add_argument("--clients", type=int, default=20, help="clients of the simulation")
    parser.add_argument("--kills", type=int, default=44, help="the most kills in the simulation")
    parser.add_argument("--fleet-rounds", type=int, default=30, help="rounds of the fleet")
    parser.add_argument("--fleet-kills", type=int, default=20, help="the most kills in the fleet")
    parser.add_argument("--seed", type=int, default=21, help="decides who is killed, and when")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file of the result")
    options = parser.parse_args(argv)
    console, failed = Console(), False
    for name, part in parts(options).items():
        if options.part in (None, name):
            result = soaked(part, partial(say, console))
            output = options.output
            results = json.loads(output.read_text()) if output.exists() else {}
            results[name] = {
                **result, "seed": options.seed, "machine": machine(), "versions": versions(),
            }  # fmt: skip
            output.parent.mkdir(parents=True, exist_ok=True)
            write_json(output, results)
            show_lines(console, list(verdict(name, result)))
            failed |= not all(result["checks"].values()) or any(result["left over"].values())
    sys.exit(failed)


def say(console: Console, line: str) -> None:
    """Show how far a part is."""
    show_lines(console, [("Soak", line)])


if __name__ == "__main__":
    main()
