"""The project's own model and data, as a task."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from fedlora_flwr import TensorRecords


class Net(nn.Module):
    """Three layers, which get adapters, and a head, which trains in full."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.head = nn.Linear(64, 10)
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, pixels):
        """Return logits, shape (n, 10), of pictures, shape (n, 64)."""
        for layer in self.layers:
            pixels = F.relu(layer(pixels))
        return self.head(pixels)


class Digits:
    """What the private step must know: the model, the records, and one loss for each record."""

    name, metric = "private-digits", "accuracy"
    lora_targets, head = r"layers\.\d+", ("head",)

    def build_model(self):
        """Return the same network in every process."""
        torch.manual_seed(0)
        return Net()

    def client_records(self, partition_id, num_partitions):
        """Return one client's share of the training pictures."""
        return _records(slice(partition_id, 1400, num_partitions))

    def test_records(self):
        """Return the public test pictures."""
        return _records(slice(1400, None))

    def losses(self, model, batch):
        """Return one loss per record, shape (n,), not their mean."""
        return F.cross_entropy(model(batch["pixels"]), batch["label"], reduction="none")

    @torch.no_grad()
    def evaluate(self, model, records):
        """Return metrics on public records."""
        batch = records.batch(torch.arange(len(records)))
        right = model(batch["pixels"]).argmax(1) == batch["label"]
        return {
            "loss": self.losses(model, batch).mean().item(),
            "accuracy": right.float().mean().item(),
        }


def _records(chosen):
    digits = load_digits()
    pixels = torch.tensor(digits.data, dtype=torch.float32) / 16
    return TensorRecords({"pixels": pixels[chosen], "label": torch.tensor(digits.target)[chosen]})
