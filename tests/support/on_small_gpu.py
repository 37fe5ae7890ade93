"""Runs a recipe on the CPU and on a device without fp64, and prints how far the adapters differ."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from fedlora_flwr import simulate
from fedlora_flwr.lora import wide_numbers
from tests.support.small_gpu import SMALL_GPU, set_up

set_up()
torch.__future__.set_overwrite_module_params_on_conversion(True)
if "--unaware" not in sys.argv:
    wide_numbers._WITHOUT_FP64 = frozenset({SMALL_GPU})
recipe, changes = sys.argv[1], json.loads(sys.argv[2])
found = []
with tempfile.TemporaryDirectory() as folder:
    for device in ("cpu", SMALL_GPU):
        run = simulate(
            recipe, run_dir=str(Path(folder) / device), device=device, progress=False, **changes
        )
        arrays = load_file(Path(folder) / device / "adapter" / "adapter_model.safetensors")
        found.append((arrays, run.summary["epsilon_max"], run.summary["final_accuracy"]))
(first, *said), (second, *again) = found
apart = max((first[name] - second[name]).abs().max().item() for name in first)
moved = max(array.abs().max().item() for name, array in first.items() if "lora_B" in name)
print(json.dumps({"apart": apart, "moved": moved, "said": said, "again": again}))
