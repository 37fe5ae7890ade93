"""Makes runs on the CPU and on a device without fp64, and prints how far the adapters differ."""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fedlora_flwr import simulate
from fedlora_flwr.lora import wide_numbers
from tests.support.small_gpu import SMALL_GPU, set_up


def main(runs: list[tuple[str, dict[str, Any]]]) -> None:
    """Print a line for each run, and one for a run that takes the device for one with fp64."""
    set_up()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    aware = wide_numbers._WITHOUT_FP64
    wide_numbers._WITHOUT_FP64 = frozenset({SMALL_GPU})
    for recipe, changes in runs:
        print(json.dumps(compared(recipe, changes)))
    wide_numbers._WITHOUT_FP64 = aware
    try:
        compared(*runs[0])
    except Exception:
        print(json.dumps({"unaware": traceback.format_exc()}))


def compared(recipe: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Make the same run on both devices."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for device in ("cpu", SMALL_GPU):
            path = Path(folder) / device
            run = simulate(recipe, run_dir=str(path), device=device, progress=False, **changes)
            arrays = load_file(path / "adapter" / "adapter_model.safetensors")
            found.append((arrays, run.summary["epsilon_max"], run.summary["final_accuracy"]))
    (first, *said), (second, *again) = found
    apart = max((first[name] - second[name]).abs().max().item() for name in first)
    moved = max(array.abs().max().item() for name, array in first.items() if "lora_B" in name)
    return {"apart": apart, "moved": moved, "said": said, "again": again}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
