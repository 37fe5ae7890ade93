"""The seconds of a round between real SuperNodes over TLS, with local noise and with a masked sum.

Run ``python -m benchmarks.deployed_sum``. Each fleet trains the digits recipe with one local step.
A masked round has four messages to each device, and one with local noise has one.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.figures import write_content
from benchmarks.running_fleet import running
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.recipes import load_recipe
from fedlora_flwr.deploy.fleet import Fleet, make_fleet
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.superlink import free_port

RESULT = Path(__file__).parent / "results" / "secure-sum" / "deployed.json"
MODELS: dict[str, dict[str, Any]] = {
    "local noise": {},
    "masked sum": {
        "trust-model": "secure-sum", "sample-rate": 0.14, "dropouts": 1, "sum-records": 5748,
    },
}  # fmt: skip


def seconds(folder: Path, devices: int, rounds: int, model: str) -> list[float]:
    """Run a fleet once; return the seconds of each round but the first, which starts processes."""
    config = RunConfig.of(
        load_recipe("digits").items(),
        {
            "strategy": "ffa-lora", "num-clients": devices, "min-clients": devices,
            "num-rounds": rounds, "local-steps": 1, "eval-every": rounds, "reproducible": False,
            "partitioner": "iid", "epsilon": 1.0, "delta": 1e-4, "device": "cpu",
            "run-dir": str(folder / "run"),
        },
        MODELS[model],
    )  # fmt: skip
    make_fleet(folder / "fleet", Fleet(devices, port=free_port()), config)
    names = [f"device-{number:02d}" for number in range(1, devices + 1)]
    for name in names:
        file = folder / "fleet" / "devices" / name / "device.toml"
        text = file.read_text().replace("delta = 1e-5", f"delta = {config.delta}")
        file.write_text(text.replace("# run-epsilon", "run-epsilon"))
    with running(folder / "fleet", folder / "operator", names) as fleet:
        said = fleet.run(config)
    rows = RunDirectory(folder / "run").rows("rounds")
    if len(rows) != rounds + 1 or any(row["failures"] for row in rows[1:]):
        raise RuntimeError(f"The run with {model} did not end well:\n{said[-3000:]}")
    return [round(float(row["seconds"]), 2) for row in rows[2:]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both trust models, and write the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deployed_sum", description=__doc__)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path, default=RESULT)
    given = parser.parse_args(arguments)
    found: dict[str, list[float]] = {}
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            found[model] = seconds(Path(folder), given.devices, given.rounds, model)
        print(f"{model}: {median(found[model]):.1f} s per round, {found[model]}", flush=True)
    content = {"devices": given.devices, "seconds": found}
    write_content(given.output, "python -m benchmarks.deployed_sum", content)


if __name__ == "__main__":
    main()
