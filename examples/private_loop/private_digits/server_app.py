"""The server: the strategy that the configuration names; it evaluates on public pictures."""

from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from fedlora_flwr import LocalTrainer, RunConfig, strategy_of
from private_digits.task import Digits

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve one run; each round's arrays go to the folder ``run-dir``, if one is named."""
    config, task = RunConfig.of(context.run_config), Digits()
    adapted = LocalTrainer.build(config, task).adapted

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        values = {name: array.numpy() for name, array in arrays.items()}
        if config.run_dir:
            np.savez(Path(config.run_dir) / f"round-{server_round}.npz", **values)
        adapted.write(values)
        return MetricRecord(task.evaluate(adapted.model, task.test_records()))

    strategy = strategy_of(config)
    result = strategy.start(
        grid,
        initial_arrays=ArrayRecord({n: Array(array) for n, array in adapted.read().items()}),
        num_rounds=config.num_rounds,
        evaluate_fn=evaluate,
    )
    for upload in strategy.last_round.uploads:
        print(f"{upload.client}: ε = {upload.metrics['epsilon']:.3f}", flush=True)
    spent = result.train_metrics_clientapp[config.num_rounds]["epsilon"]
    for server_round, metrics in result.evaluate_metrics_serverapp.items():
        print(f"round {server_round}: accuracy {metrics['accuracy']:.3f}", flush=True)
    print(f"spent: ε = {spent:.3f} of {config.epsilon:g} at δ = {config.delta:g}", flush=True)
