"""From a torch module and a pandas table to a private adapter."""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

from fedlora_flwr import TableTask, predict, simulate

frame = load_digits(as_frame=True).frame.sample(frac=1, random_state=0)
pixels = [name for name in frame.columns if name != "target"]
frame[pixels] /= 16
public, private, test = frame[:400], frame[400:1400], frame[1400:]

# The backbone learns from public records, as a downloaded one has.
net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
few = public[public["target"] < 5]
x, y = torch.tensor(few[pixels].to_numpy()).float(), torch.tensor(few["target"].to_numpy())
adam = torch.optim.Adam(net.parameters(), lr=1e-2)
for _ in range(100):
    adam.zero_grad()
    nn.functional.cross_entropy(net(x), y).backward()
    adam.step()
net[4] = nn.Linear(64, 10)  # A new head, for all ten digits.

task = TableTask(net, private, test, label="target", lora_targets="[02]", head=("4",))
result = simulate(
    task=task,
    strategy="rolora",
    epsilon=8.0,
    num_clients=4,
    num_rounds=10,
    partitioner="iid",
    output=sys.argv[1] if len(sys.argv) > 1 else "runs",
)
print(result.rounds[["round", "accuracy", "epsilon_max"]].to_string(index=False))
print(predict(result, test[pixels].head(3))[["prediction", "probability"]])
model = result.model()  # A PeftModel on a copy of the module.
print("adapter:", result.adapter)
