"""The client: the project's own loop, which obeys the server's plan."""

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from digits_lora.task import build_model, load_data, train
from fedlora_flwr import follow_plan

app = ClientApp()


@app.train()
def fit(message: Message, context: Context) -> Message:
    """Train one round."""
    node, config = context.node_config, context.run_config
    data = load_data(node["partition-id"], node["num-partitions"])
    model = build_model()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=config["learning-rate"])

    planned = follow_plan(message, model, optimizer)  # arrays in; each step trains what is planned
    loss = train(model, optimizer, data, config["local-steps"])
    return planned.reply(message, {"num-examples": len(data), "loss": loss})  # what trained, out
