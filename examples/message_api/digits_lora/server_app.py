"""The server: a FedLoRA strategy where FedAvg was."""

from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from digits_lora.task import accuracy, build_model, load_data
from fedlora_flwr import ASLoRA, LALoRA, RoLoRA

STRATEGIES = {"rolora": RoLoRA, "la-lora": LALoRA, "as-lora": ASLoRA}

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve one run; each round's arrays go to the folder ``output``, if one is named."""
    config = context.run_config
    model, test = build_model(), load_data(train=False)

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        set_peft_model_state_dict(model, arrays.to_torch_state_dict())
        if config["output"]:
            path = Path(config["output"]) / f"round-{server_round}.npz"
            np.savez(path, **{name: array.numpy() for name, array in arrays.items()})
        return MetricRecord({"accuracy": accuracy(model, test)})

    strategy = STRATEGIES[config["strategy"]]()  # was: FedAvg(fraction_evaluate=0.0)
    result = strategy.start(
        grid,
        initial_arrays=ArrayRecord(get_peft_model_state_dict(model)),
        num_rounds=config["num-rounds"],
        evaluate_fn=evaluate,
    )
    for server_round, metrics in result.evaluate_metrics_serverapp.items():
        print(f"round {server_round}: accuracy {metrics['accuracy']:.3f}", flush=True)
