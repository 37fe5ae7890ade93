"""The client: a NumPyClient with the project's own loop, which obeys the server's plan."""

import torch
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import Context

from fedlora_flwr import follow_fit
from legacy_digits.task import build_model, load_data, train


class DigitsClient(NumPyClient):
    """One client's pictures and loop."""

    def __init__(self, data, config):
        self.data, self.config = data, config

    def fit(self, parameters, config):
        """Train one round."""
        model = build_model()
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=self.config["learning-rate"])

        planned = follow_fit(parameters, config, model, optimizer)  # arrays and plan in
        loss = train(model, optimizer, self.data, self.config["local-steps"])
        return planned.fit_result(len(self.data), {"loss": loss})  # what trained, with its names


def client_fn(context: Context) -> Client:
    """Make the client of one partition."""
    node = context.node_config
    data = load_data(node["partition-id"], node["num-partitions"])
    return DigitsClient(data, context.run_config).to_client()


app = ClientApp(client_fn)
