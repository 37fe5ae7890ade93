"""`compare` from Python: what is refused, and what is read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora_flwr import TableTask, compare
from fedlora_flwr.errors import InvalidValue
from tests.simulations.tables import table

SMALL: dict[str, Any] = {
    "num_clients": 2, "num_rounds": 1, "local_steps": 1, "partitioner": "iid", "device": "cpu",
    "delta": 1e-3, "reproducible": True, "seeds": 2, "trials": 0, "epsilons": [8],
}  # fmt: skip


def own_task() -> TableTask:
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    return TableTask(net, table(), table(60), lora_targets="0", head=("1",))


def test_strategies_are_compared_on_an_object(tmp_path: Path) -> None:
    task = own_task()
    names = ["rolora", "ffa-lora"]
    found = compare("digits", names, task=task, output=tmp_path, baselines="none", **SMALL)
    assert found.table["row"].tolist() == names
    assert (len(found.runs), found.failed) == (4, 0)
    means = found.runs.groupby("row")["final"].mean()
    assert found.table["mean"].tolist() == pytest.approx([means["rolora"], means["ffa-lora"]])
    assert found.as_json()["folder"] == str(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epsilon": 3}, "changes = 'epsilon' cannot be used: expected a key that compare itself"),
        ({"epsilons": [0]}, "epsilons = [0.0] cannot be used: expected numbers above 0"),
        ({"strategies": ["rolara"]}, "did you mean 'rolora'"),
        (
            {"trackers": "tensorboard"},
            "because a comparison does not follow this key: its runs keep no folder",
        ),
        ({"task": own_task(), "workers": 2}, "workers = 2 cannot be used: expected this process"),
        (
            {"strategies": ["rolora"], "metric_for_best_model": "loss"},
            "metric-for-best-model = 'loss' cannot be used: expected a figure of which more is",
        ),
        (
            {"strategies": ["rolora"], "metric_for_best_model": "acuracy"},
            "metric-for-best-model = 'acuracy' cannot be used: did you mean 'accuracy'?",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidValue) as told:
        compare("digits", output=tmp_path / "new", **{**SMALL, **changes})
    assert said in str(told.value)
    assert not (tmp_path / "new").exists()
