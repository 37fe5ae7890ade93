"""The client: our private step where the project's own loop was."""

from functools import lru_cache

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlora_flwr import (
    Ledger,
    LocalRound,
    LocalTrainer,
    RunConfig,
    answer_message,
    client_identity,
    state_folder,
)
from private_digits.task import Digits

app = ClientApp()


@lru_cache(maxsize=1)
def trainer(config: RunConfig) -> LocalTrainer:
    """Build model and private step once per process."""
    return LocalTrainer.build(config, Digits())


@app.train()
def fit(message: Message, context: Context) -> Message:
    """Train one round: private steps under the server's plan, a ledger row, then the reply."""
    node, config = context.node_config, RunConfig.of(context.run_config)
    local_round = LocalRound(
        trainer(config),
        lambda: Digits().client_records(node["partition-id"], node["num-partitions"]),
        Ledger(state_folder(config) / "ledger.sqlite"),
        client_identity(context),
        str(context.run_id),
    )
    return answer_message(local_round, message, local_round.identity)
