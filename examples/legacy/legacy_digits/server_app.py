"""The server: server_fn with a FedLoRA strategy, wrapped, where the legacy FedAvg was."""

from pathlib import Path

import numpy as np
import torch
from flwr.common import Context
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from fedlora_flwr import ASLoRA, LALoRA, LegacyStrategy, RoLoRA
from legacy_digits.task import accuracy, build_model, load_data

STRATEGIES = {"rolora": RoLoRA, "la-lora": LALoRA, "as-lora": ASLoRA}


def server_fn(context: Context) -> ServerAppComponents:
    """Make the strategy; each round's arrays go to the folder ``output``, if one is named."""
    config = context.run_config
    model, test = build_model(), load_data(train=False)
    start = {name: p.numpy(force=True) for name, p in get_peft_model_state_dict(model).items()}

    def evaluate(server_round, parameters, _):
        arrays = dict(zip(start, parameters, strict=True))
        set_peft_model_state_dict(model, {name: torch.tensor(a) for name, a in arrays.items()})
        if config["output"]:
            np.savez(Path(config["output"]) / f"round-{server_round}.npz", **arrays)
        right = accuracy(model, test)
        print(f"round {server_round}: accuracy {right:.3f}", flush=True)
        return 1 - right, {"accuracy": right}

    rounds = config["num-rounds"]
    strategy = LegacyStrategy(  # was: flwr.server.strategy.FedAvg(initial_parameters=…, …)
        STRATEGIES[config["strategy"]](), start, rounds, evaluate_fn=evaluate
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=rounds))


app = ServerApp(server_fn=server_fn)
