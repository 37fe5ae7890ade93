"""What each installation can do: real work in a process that has the core and some extras."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.backbones import checkpoints
from tests.data.pictures import image_config, write_pictures
from tests.hostile import tiny_task
from tests.installed import absent_with, run_with
from tests.tasks.texts import ALL, text_config, write_reviews

CORE_RUN = """
import numpy as np
from fedlora_flwr import DPLoRA, FedSVD, FFALoRA, FlexLoRA, LALoRA, LegacyStrategy, RoLoRA
from tests.strategies.tiny import Tiny, arrays_of, start_arrays

assert LegacyStrategy
for strategy in (DPLoRA(), FFALoRA(), RoLoRA(), LALoRA(), FedSVD(), FlexLoRA()):
    tiny = Tiny(3)
    final = arrays_of(tiny.run(strategy, 2).arrays)
    moved = [name for name, array in start_arrays().items() if (array != final[name]).any()]
    print(type(strategy).__name__, len(tiny.asked), len(moved))
"""


def test_the_core_serves_the_strategies_of_a_flower_project(tmp_path: Path) -> None:
    said = run_with(code=CORE_RUN, cwd=tmp_path).splitlines()
    assert said == [
        "DPLoRA 6 5",
        "FFALoRA 6 3",
        "RoLoRA 6 5",
        "LALoRA 6 5",
        "FedSVD 6 5",
        "FlexLoRA 6 5",
    ]


PLOT = """
from typer.testing import CliRunner
from fedlora_flwr.cli import app

print(CliRunner().invoke(app, ["plot", "."]).output)
"""


def test_plots_need_no_torch(tmp_path: Path) -> None:
    row: dict[str, Any] = {"round": 0, "accuracy": 0.5, "loss": 1.0, "seconds": 1.0}
    later = {**row, "round": 1, "plan": "B", "epsilon_max": 1.0}
    text = "".join(json.dumps(line) + "\n" for line in (row, later))
    (tmp_path / "rounds.jsonl").write_text(text)
    assert "rounds.png" in run_with("plots", code=PLOT, cwd=tmp_path)
    assert (tmp_path / "rounds.png").read_bytes().startswith(b"\x89PNG")


# Importing torch takes longest: each task runs in a copy of a process that has done so.
TRAINING = """
import os
from pathlib import Path
from fedlora_flwr.clients.local_round import LocalRound
from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.privacy.ledger import Ledger
from fedlora_flwr.wire.order import Order

def train(absent, settings):
    Absent.modules = set(absent)
    trainer = LocalTrainer.build(RunConfig.of(settings))
    ledger = Ledger(Path(f"{os.getpid()}.sqlite"))
    local_round = LocalRound(trainer, trainer.task.client_records(0, 1), ledger, "one", "run")
    done = local_round.run(Order(server_round=1, plan="B"), dict(local_round.start))
    sent = sum("lora_B" in name for name in done.arrays)
    print(settings["task"], sent > 0, done.ledger.steps, 0 < done.ledger.epsilon <= 8, flush=True)

for absent, settings in json.loads(Path("rounds.json").read_text()):
    if (child := os.fork()) == 0:
        train(absent, settings)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_devices_train_privately_with_the_extras_of_their_task(tmp_path: Path) -> None:
    points, words = tmp_path / "points.npy", tmp_path / "words"
    np.save(points, tiny_task.points(0, 64))
    model = checkpoints.bert(tmp_path / "bert", ALL)
    configs: list[tuple[str, dict[str, Any]]] = [
        ("client", {"task": tiny_task.NAME, "dataset": str(points)}),
        ("text", dict(text_config(model, write_reviews(words)).items())),
        ("vision", dict(image_config(write_pictures(tmp_path / "pictures", 60)).items())),
        ("vision", {"task": "digits", "partitioner": "iid"}),
    ]
    quick = {"local-steps": 2, "batch-size": 4, "num-rounds": 2, "device": "cpu", "delta": 1e-4}
    rounds = [(absent_with("client", extra), {**own, **quick}) for extra, own in configs]
    (tmp_path / "rounds.json").write_text(json.dumps(rounds))
    assert {"timm", "PIL", "ray"} < set(absent_with("client", "text"))
    said = run_with("client", code=TRAINING, cwd=tmp_path).splitlines()
    tasks = (tiny_task.NAME, "text-classification", "image-classification", "digits")
    assert said[-4:] == [f"{task} True 2 True" for task in tasks]
