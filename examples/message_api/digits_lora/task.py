"""The project's own model, data and loop."""

from itertools import cycle, islice

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


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


def build_model():
    """Return the same network with the same fresh adapters in every process."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=r"layers\.\d+", modules_to_save=["head"])
    return get_peft_model(Net(), lora)


def load_data(part=0, parts=1, train=True):
    """Return one client's share of the training pictures, or the public test pictures."""
    digits = load_digits()
    pixels = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    chosen = slice(part, 1400, parts) if train else slice(1400, None)
    return TensorDataset(pixels[chosen], labels[chosen])


def train(model, optimizer, data, steps):
    """Take ``steps`` steps; return the last loss."""
    model.train()
    batches = cycle(DataLoader(data, batch_size=32, shuffle=True))
    for pixels, labels in islice(batches, steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(pixels), labels)
        loss.backward()
        optimizer.step()
    return loss.item()


@torch.no_grad()
def accuracy(model, data):
    """Return the share of pictures that the model names right."""
    model.eval()
    pixels, labels = data.tensors
    return (model(pixels).argmax(1) == labels).float().mean().item()
