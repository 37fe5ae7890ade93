"""The attack on Flower's Opacus example, on a client of the same form that adds almost no noise."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.peers import flower_opacus

CLIENT = """
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.flat, self.last = torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10)

    def forward(self, pictures):
        return self.last(self.flat(pictures))

def load_data(partition_id, num_partitions):
    raise AssertionError("nothing may be downloaded")

app = ClientApp()

@app.train()
def train(message, context):
    loader, _ = load_data(partition_id=0, num_partitions=1)
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    for batch in loader:
        found = net(batch["img"])
        torch.nn.functional.cross_entropy(found, batch["label"], reduction="sum").backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in net.parameters()))
    with torch.no_grad():
        for p in net.parameters():
            clipped = p.grad / max(norm, context.run_config["max-grad-norm"])
            p -= 0.001 * (clipped + 1e-3 * torch.randn(p.shape))
    metrics = MetricRecord({"epsilon": 0.5})
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)
"""


def test_a_client_that_reports_too_little_is_found(tmp_path: Path) -> None:
    package = tmp_path / "opacus_fl"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "client_app.py").write_text(CLIENT)
    output = tmp_path / "found.json"
    flower_opacus.main(
        [str(tmp_path), "--rounds", "1", "2", "--trials", "60", "--output", str(output)]
    )
    rows = json.loads(output.read_text())["rows"]
    assert [(row["rounds"], row["trials"], row["reported"]) for row in rows] == [
        (1, 60, 0.5), (2, 60, 0.5),
    ]  # fmt: skip
    assert all(row["bounds"]["Gaussian fit"] > 5 for row in rows)
