"""Federations of two LoRA blocks and a head, with clients whose arithmetic fits in a line."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Result
from numpy.typing import NDArray

from fedlora_flwr.layout import Layout
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies import FedLoRA

Arrays = dict[str, NDArray[np.float32]]
NAMES = (
    "blocks.0.fc.lora_A.weight",
    "blocks.0.fc.lora_B.weight",
    "blocks.1.fc.lora_A.weight",
    "blocks.1.fc.lora_B.weight",
    "head.bias",
)
A_NAMES = tuple(name for name in NAMES if "lora_A" in name)
B_NAMES = tuple(name for name in NAMES if "lora_B" in name)


def start_arrays() -> Arrays:
    rng = np.random.default_rng(0)
    shapes = {"A": (2, 3), "B": (4, 2), "h": (5,)}
    return {
        name: rng.normal(size=shapes[name[-8] if "lora" in name else "h"]).astype(np.float32)
        for name in NAMES
    }


def record_of(arrays: Mapping[str, NDArray[np.generic]]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def arrays_of(record: ArrayRecord) -> Arrays:
    return {name: array.numpy().astype(np.float32) for name, array in record.items()}


@dataclass
class Asked:
    """What one client was asked in one round."""

    partition: int
    server_round: int
    plan: ComponentPlan
    weighting: str
    arrays: Arrays
    dtypes: set[str]

    def trained(self) -> Arrays:
        """An upload of what the plan trains, moved by a random step of this client's own."""
        names = Layout.of(self.arrays).trained(self.plan, num_steps=len(self.plan.steps))
        rng = np.random.default_rng((self.partition, self.server_round))
        return {
            name: (self.arrays[name] + rng.normal(size=self.arrays[name].shape)).astype(np.float32)
            for name in names
        }


Answer = Callable[[Asked], RecordDict]


def reply_of(
    arrays: Mapping[str, NDArray[np.generic]], partition: int, **metrics: float
) -> RecordDict:
    return RecordDict(
        {
            "arrays": record_of(arrays),
            "metrics": MetricRecord({"num-examples": 1, **metrics}),
            "config": ConfigRecord({"client": f"partition-{partition:06d}", "status": "ok"}),
        }
    )


def declined(partition: int) -> RecordDict:
    content = reply_of({}, partition)
    content.config_records["config"]["status"] = "budget-exhausted"
    return content


def honest(asked: Asked) -> RecordDict:
    return reply_of(asked.trained(), asked.partition, epsilon=float(asked.partition))


class Fleet(LocalGrid):
    """Vouches for no name of a client, as Flower's own grids do."""

    def get_node_ids(self) -> Iterable[int]:
        return list(self._nodes)


@dataclass
class Tiny:
    """A grid of tiny clients and all that they were asked."""

    num_clients: int
    answer: Answer = honest
    bridged: bool = True
    kind: type[LocalGrid] = LocalGrid
    asked: list[Asked] = field(default_factory=list)
    uploads: list[RecordDict] = field(default_factory=list)

    def app(self) -> ClientApp:
        app = ClientApp()

        @app.train()  # type: ignore[untyped-decorator,unused-ignore]
        def train(message: Message, context: Context) -> Message:
            content, partition = message.content, int(context.node_config["partition-id"])
            config = content.config_records["config"]
            asked = Asked(
                partition,
                int(str(config["server-round"])),
                ComponentPlan.parse(str(config["plan"])),
                str(config.get("weighting", "uniform")),
                arrays_of(content.array_records["arrays"]),
                {array.dtype for array in content.array_records["arrays"].values()},
            )
            self.asked.append(asked)
            reply = self.answer(asked)
            self.uploads.append(reply)
            return Message(reply, reply_to=message)

        if self.bridged:

            @app.query()  # type: ignore[untyped-decorator,unused-ignore]
            def query(message: Message, context: Context) -> Message:
                client = f"partition-{int(context.node_config['partition-id']):06d}"
                content = RecordDict({"config": ConfigRecord({"client": client})})
                return Message(content, reply_to=message)

        return app

    @contextmanager
    def grid(self) -> Iterator[LocalGrid]:
        with self.kind(self.app(), self.num_clients, {}).running() as grid:
            yield grid

    def run(self, strategy: FedLoRA, num_rounds: int = 1) -> Result:
        with self.grid() as grid:
            return strategy.start(grid, record_of(start_arrays()), num_rounds=num_rounds)

    def received(self, server_round: int) -> Arrays:
        """Return the global arrays that clients got in a round."""
        return next(entry.arrays for entry in self.asked if entry.server_round == server_round)

    def cohort(self, server_round: int) -> list[int]:
        return sorted(e.partition for e in self.asked if e.server_round == server_round)


def moved(tiny: Tiny, final: Arrays, rounds: int) -> list[set[str]]:
    """Return the names of the arrays whose bits changed in each round."""
    states = [tiny.received(r) for r in range(1, rounds + 1)] + [final]
    return [
        {name for name in NAMES if before[name].tobytes() != after[name].tobytes()}
        for before, after in itertools.pairwise(states)
    ]


def plans(method: FedLoRA, rounds: int) -> list[str]:
    """Return the plans of the first rounds."""
    layout = Layout.of(NAMES)
    return [str(method.plan(server_round, layout)) for server_round in range(1, rounds + 1)]
