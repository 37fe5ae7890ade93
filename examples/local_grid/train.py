"""A federation on `LocalGrid`: real Flower messages, without a server and without Ray."""

import sys
from pathlib import Path

from flwr.app import ArrayRecord, MetricRecord

from fedlora_flwr import LocalGrid, LocalTrainer, RoLoRA, RunConfig
from fedlora_flwr.client_app import respond
from fedlora_flwr.strategies.replies import to_record
from fedlora_flwr.wire.arrays import to_numpy

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "state").resolve()
folder.mkdir(parents=True, exist_ok=True)
# The clients' ledgers go into the folder.
config = RunConfig(
    num_clients=4, min_clients=4, num_rounds=3, local_steps=8, epsilon=8, state_dir=str(folder)
)
trainer = LocalTrainer.build(config)
task, adapted = trainer.task, trainer.adapted


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Measure the global model on the public records."""
    adapted.write({name: to_numpy(array) for name, array in arrays.items()})
    found = task.evaluate(adapted.model, task.test_records())
    print(f"round {server_round}: accuracy {found['accuracy']:.3f}")
    return MetricRecord(found)


# A Grid of Flower's, whose nodes are served in this process. Any Message-API strategy runs on it.
with LocalGrid(respond, config.num_clients, config.items()).running() as grid:
    strategy = RoLoRA(fraction_train=1.0, min_available_nodes=4, local_steps=config.local_steps)
    result = strategy.start(
        grid,
        initial_arrays=to_record(trainer.start),
        num_rounds=config.num_rounds,
        evaluate_fn=evaluate,
    )
adapted.write({name: to_numpy(array) for name, array in result.arrays.items()})
adapted.export(folder / "adapter")
