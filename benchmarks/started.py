"""A process that gets ready for a private step, which `benchmarks.start` starts.

Every import is in a function, because most of the measured time goes to imports.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DEVICE_FILE, RUN_FILE, MODEL = "device/device.toml", "run.toml", "model"


class Clock:
    """CPU seconds of this process after the first ``start``, by stage."""

    def __init__(self, start: float = 0.0) -> None:
        self.stages: dict[str, float] = {}
        self._start = start

    def done(self, stage: str) -> None:
        """Count the seconds since the last stage, or since the process started, as this stage."""
        self.stages[stage] = time.process_time() - self._start - sum(self.stages.values())


def load_flower() -> None:
    """Import Flower as the process does that a device starts for each message."""
    from fedlora_flwr.deploy.client_process import app_for
    from fedlora_flwr.deploy.flower import handle_with
    from fedlora_flwr.processes import uncollected

    with uncollected():
        handle_with(app_for)


def as_a_client(folder: Path, clock: Clock) -> None:
    """Do what a device's process does with a training message, up to the first private step."""
    load_flower()
    clock.done("Flower")
    from fedlora_flwr import client_app  # noqa: F401
    from fedlora_flwr.processes import uncollected

    with uncollected():
        from fedlora_flwr.clients import numpy_client  # noqa: F401
    clock.done("imports")
    get_ready(folder, clock)


def as_a_warm_client(folder: Path, clock: Clock) -> None:
    """Do the same in the process that the device has kept since its last message."""
    load_flower()
    clock.done("Flower")
    # The function needs a name by which any process can import it.
    from benchmarks import started
    from fedlora_flwr import client_app  # noqa: F401
    from fedlora_flwr.clients.device import Device
    from fedlora_flwr.clients.warm import WarmProcess

    clock.done("imports")
    file = folder / DEVICE_FILE
    worked = WarmProcess.of(Device.read(file), file).call(started.get_ready_again, folder)
    clock.done("asking")
    clock.stages["warm process"] = worked


def get_ready(folder: Path, clock: Clock) -> None:
    """Do everything for a training message that comes before its first step."""
    from flwr.app import Context, RecordDict

    from fedlora_flwr import client_app
    from fedlora_flwr.clients.device import Device
    from fedlora_flwr.clients.trainer import process_trainer
    from fedlora_flwr.config import RunConfig, read_toml
    from fedlora_flwr.privacy.calibration import calibrated_mechanism

    device = str(folder / DEVICE_FILE)
    run = RunConfig.of(read_toml(folder / RUN_FILE)).items()
    config = Device.read(Path(device)).config(run)
    trainer = process_trainer(config)
    _ = trainer.adapted.fingerprint
    clock.done("model")
    # The process keeps its trainer, so the message finds it.
    client_app.make_client(Context(1, 1, {"device": device}, RecordDict(), run))
    records = trainer.task.client_records(0, 1)
    clock.done("records")
    calibrated_mechanism(config, len(records))
    trainer.load(trainer.start)
    clock.done("noise")


def get_ready_again(folder: Path) -> float:
    """Return the CPU seconds to get ready in a process that may have done so before."""
    clock = Clock(time.process_time())
    get_ready(folder, clock)
    return sum(clock.stages.values())


def as_scripts_do(folder: Path, clock: Clock) -> None:
    """Import everything and build the private model as a script on PEFT and Opacus does."""
    import opacus
    import peft
    import timm  # noqa: F401
    import torch
    import transformers

    clock.done("imports")
    auto: Any = transformers.AutoModelForSequenceClassification
    lora = peft.LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
    model = peft.get_peft_model(auto.from_pretrained(folder / MODEL, num_labels=2), lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tokens = torch.zeros(2000, 64, dtype=torch.int64)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens), batch_size=64)
    opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(trained, lr=0.1),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    clock.done("model")


WAYS = {"client": as_a_client, "warm": as_a_warm_client, "plain": as_scripts_do}


def main(arguments: Sequence[str] | None = None) -> None:
    """Get ready for a private step, and print how long each stage took."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.started", description=main.__doc__)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args(arguments)
    started = Clock()
    WAYS[given.way](given.folder, started)
    loaded = sorted({name.split(".")[0] for name in sys.modules})
    print(json.dumps({"stages": started.stages, "modules": loaded}), flush=True)


if __name__ == "__main__":
    main()
