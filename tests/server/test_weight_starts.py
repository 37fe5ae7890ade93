"""Runs that start from factors of the weights, under every method of means and under a sum."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.forecast.forecast import forecast
from fedlora_flwr.layout import is_folded
from fedlora_flwr.lora.build import build_adapted
from fedlora_flwr.server.checkpoint import Checkpoints
from fedlora_flwr.server.strategy import build_strategy
from fedlora_flwr.tasks.registry import build_task
from tests.server.resuming import begin, rows, tiny

SUM = {"trust_model": "secure-sum", "sample_rate": 0.2, "local_steps": 1, "delta": 1e-3}


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        ("dp-lora", {"lora_init": "olora"}),
        ("ffa-lora", {}),
        ("ffa-seeds", {}),
        ("rolora", {"average_decay": 0.5}),
        ("as-lora", {"blocks": ".+"}),
        ("fedsvd", {}),
        ("flexlora", {}),
        ("flora", {}),
        ("fedex-lora", {}),
        ("fedadam", {}),
        ("fedavg", {}),
        ("fedavgm", {}),
        ("dp-lora", SUM),
    ],
)
def test_a_run_starts_as_the_plain_model_and_exports_what_it_measured(
    strategy: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = tiny(tmp_path, num_rounds=2, strategy=strategy, lora_init="pissa")
    config = replace(config, **changes)
    plain = replace(config, lora_init="random")
    begin(config, tmp_path / "run")
    begin(replace(plain, num_rounds=1), tmp_path / "plain")

    measured = rows(tmp_path / "run", "rounds")
    assert measured[0]["loss"] == pytest.approx(rows(tmp_path / "plain", "rounds")[0]["loss"], 1e-4)
    assert measured[2]["loss"] != measured[0]["loss"]
    kept = Checkpoints(tmp_path / "run").last()[0].arrays
    assert any(is_folded(name) for name in kept)
    # Plain PEFT loads the adapter onto the model as it came.
    task = build_task(config.task, config)
    loaded = PeftModel.from_pretrained(task.build_model(), str(tmp_path / "run" / "adapter"))
    found = task.evaluate(loaded.eval(), task.test_records())
    assert found["loss"] == pytest.approx(measured[2]["loss"], rel=1e-4)


def test_clients_train_from_the_factors_that_the_server_made(tmp_path: Path) -> None:
    """A client that started from B = 0 would upload another B."""
    config = tiny(tmp_path, num_rounds=1, strategy="ffa-lora", lora_init="pissa", lr_b=0.0)
    begin(config, tmp_path / "run")
    kept = Checkpoints(tmp_path / "run").last()[0].arrays
    adapted = build_adapted(config, build_task(config.task, config))
    weight = dict(adapted.folded._layers)
    for name, layer in weight.items():
        base: Any = layer.base
        values = torch.linalg.svdvals(base.weight.detach())
        b = torch.from_numpy(kept[f"{name}.lora_B.weight"]).double()
        a = torch.from_numpy(kept[f"{name}.lora_A.weight"]).double()
        products = torch.linalg.svdvals(layer.scaling * b @ a)[: adapted.rank]
        torch.testing.assert_close(products.float(), values[: adapted.rank], rtol=1e-4, atol=1e-5)


def test_methods_that_leave_factors_with_clients_are_refused(tmp_path: Path) -> None:
    for changes in ({"strategy": "fedsa-lora"}, {"share_head": False}):
        config = tiny(tmp_path, lora_init="pissa", **changes)
        with pytest.raises(InvalidValue, match=r"lora-init = 'pissa' .*with each client"):
            build_strategy(config)


def test_a_forecast_counts_the_folded_pairs(tmp_path: Path) -> None:
    config = tiny(tmp_path, strategy="ffa-lora")
    down = [forecast(replace(config, lora_init=how), 20).bytes_down for how in ("random", "pissa")]
    begin(replace(config, lora_init="pissa", num_rounds=1), tmp_path / "run")
    kept = Checkpoints(tmp_path / "run").last()[0].arrays
    folded = [array for name, array in kept.items() if is_folded(name)]
    assert down[1] - down[0] == sum(array.nbytes + 128 for array in folded)
