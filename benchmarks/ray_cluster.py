"""Rounds on Ray clusters of one, two and four nodes on loopback, and what travels to each node."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import psutil  # type: ignore[import-untyped]
import torch

from benchmarks.figures import Figure
from benchmarks.marked import MARK, marked
from benchmarks.running_cluster import running_cluster
from benchmarks.step import Shape, roberta, token_batch
from benchmarks.tasks import ShapeTask
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.recipes import load_recipe
from fedlora_flwr.server.rounds import RoundRow
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import prepare_run, run_on_flower
from fedlora_flwr.tasks.registry import build_task

NODE = "FEDLORA_NODE"
"""Environment variable with a node's number, which its workers inherit."""
_SENT, _RECEIVED = re.compile(r"bytes_sent:(\d+)"), re.compile(r"bytes_received:(\d+)")


class Texts(ShapeTask):
    """Random texts of SST-2's mean length for a random encoder of MiniLM's size."""

    def shape(self) -> Shape:
        """Return the model and its input."""
        encoder = roberta(
            "six layers of 384", hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
            intermediate_size=1536,
        )  # fmt: skip
        return replace(encoder, batch=partial(token_batch, tokens=13, vocabulary=30000))


@dataclass(frozen=True)
class Setting:
    """Which clusters there are, and how many rounds of each recipe are measured after the first.

    Clients are a multiple of every number of nodes.
    """

    nodes: tuple[int, ...] = (1, 2, 4)
    clients: int = 8
    rounds: Mapping[str, int] = field(default_factory=lambda: {"digits": 8, "texts": 4})


@dataclass(frozen=True)
class Seen:
    """What all processes of a run and its cluster have used until now.

    Parameters
    ----------
    at : float
        Clock, in seconds.
    cpu : dict[int, float]
        CPU seconds by process.
    sent, received : int
        Bytes over TCP of all processes of the nodes beside the first, where the server is. What was
        sent again counts again.
    """

    at: float
    cpu: dict[int, float]
    sent: int
    received: int

    def cpu_since(self, before: Seen) -> float:
        """Return the CPU seconds of the processes that are there since an earlier look."""
        return sum(used - before.cpu.get(pid, 0.0) for pid, used in self.cpu.items())


@dataclass(frozen=True)
class Measured:
    """One recipe on one cluster.

    Parameters
    ----------
    start, start_cpu : float
        Seconds, and CPU seconds, from the run's start to the end of its first round.
    seconds : float
        Wall time of the fastest round after the first, which others' work disturbs least.
    cpu : float
        CPU seconds of all processes in a round.
    sent, received : float
        Bytes over TCP in a round, of the nodes beside the first.
    up, down : float
        Bytes of arrays in a round's messages.
    reads : Mapping[str, int]
        Bytes that each node reads from its own disk.
    """

    start: float
    start_cpu: float
    seconds: float
    cpu: float
    sent: float
    received: float
    up: float
    down: float
    reads: Mapping[str, int]


def measure(setting: Setting, on_figure: Callable[[Figure], None]) -> None:
    """Run each recipe on each cluster."""
    alone: dict[str, Measured] = {}
    for nodes in setting.nodes:
        with a_cluster(nodes) as mark:
            for name, rounds in setting.rounds.items():
                found = measured(recipe(name, setting.clients, rounds + 1), mark)
                reference = alone.setdefault(name, found)
                for figure in figures(f"{name}, nodes: {nodes}", nodes, found, reference):
                    on_figure(figure)
    for name, found in alone.items():
        for part, size in found.reads.items():
            what = f"{name}: {part}, which never travel"
            on_figure(Figure(what, size / 1e6, None, "MB", "each node reads its own copy"))


def recipe(name: str, clients: int, rounds: int) -> RunConfig:
    """Return the digits recipe, or one on generated texts, for so many clients and rounds."""
    own = {"num-clients": clients, "num-rounds": rounds, "eval-every": rounds, "device": "cpu"}
    if name == "digits":
        return RunConfig.of(load_recipe("digits", []).items(), own)
    texts = {
        "task": "benchmarks.ray_cluster:Texts", "strategy": "dp-lora", "partitioner": "iid",
        "rank": 4, "local-steps": 2, "batch-size": 32, "epsilon": 8.0, "delta": 1e-3,
    }  # fmt: skip
    return RunConfig.of(texts, own)


@contextmanager
def a_cluster(nodes: int) -> Iterator[str]:
    """Run on so many nodes with one CPU each, and give the mark of all their processes."""
    with (
        tempfile.TemporaryDirectory(prefix="fedlora-bench-") as mark,
        mock.patch.dict(os.environ, {MARK: mark}),
        running_cluster([{NODE: str(node)} for node in range(nodes)]) as variables,
        mock.patch.dict(os.environ, variables),
    ):
        yield mark


def measured(config: RunConfig, mark: str) -> Measured:
    """Run on the cluster whose processes have a mark."""
    prepared = prepare_run(config)
    begin = seen(mark)
    looks: dict[int, Seen] = {}
    rows: list[RoundRow] = []

    def after(row: RoundRow) -> None:
        looks[row["round"]] = seen(mark)
        rows.append(row)

    with tempfile.TemporaryDirectory(prefix="fedlora-bench-") as scratch:
        run_on_flower(prepared, RunDirectory(Path(scratch) / "run"), after)
    # What a run does after its last round belongs to no round.
    first, last = looks[1], looks[len(rows) - 2]
    rounds, later = len(rows) - 3, rows[2:]
    return Measured(
        start=first.at - begin.at,
        start_cpu=first.cpu_since(begin),
        seconds=min(row["seconds"] for row in later),
        cpu=last.cpu_since(first) / rounds,
        sent=(last.sent - first.sent) / rounds,
        received=(last.received - first.received) / rounds,
        up=statistics.mean(row["bytes_up"] for row in later),
        down=statistics.mean(row["bytes_down"] for row in later),
        reads={
            "frozen weights": 4 * prepared.parameters,
            "records of all clients": bytes_of_records(prepared.config),
        },
    )


def bytes_of_records(config: RunConfig) -> int:
    """Return the bytes of all clients' records as tensors."""
    task = build_task(config.task, config)
    total = 0
    for client in range(config.num_clients):
        records = task.client_records(client, config.num_clients)
        batch = records.batch(torch.arange(len(records)))
        total += sum(tensor.nbytes for tensor in batch.values())
    return total


def figures(what: str, nodes: int, found: Measured, alone: Measured) -> list[Figure]:
    """Return the figures of one cluster beside those of one node."""
    efficiency = alone.seconds / (nodes * found.seconds)
    one = "one node"
    made: list[tuple[str, float, float, str, str]] = [
        ("a round", found.seconds, alone.seconds, "s", f"{one}; efficiency {efficiency:.2f}"),
        ("CPU time of a round", found.cpu, alone.cpu, "s", one),
        ("start to the end of round 1", found.start, alone.start, "s", one),
        ("CPU time of it", found.start_cpu, alone.start_cpu, "s", one),
    ]
    if further := nodes - 1:  # The clients are spread over all nodes.
        ways = {"to": (found.received, found.down), "from": (found.sent, found.up)}
        made += [
            (f"{way} each further node per round", tcp / further / 1e3, arrays / nodes / 1e3, "kB",
             "its clients' arrays")
            for way, (tcp, arrays) in ways.items()
        ]  # fmt: skip
    return [
        Figure(f"{what}: {part}", ours, reference, unit, against)
        for part, ours, reference, unit, against in made
    ]


def seen(mark: str) -> Seen:
    """Look at all processes that have a mark."""
    cpu, of_nodes = dict[int, float](), set[int]()
    for pid in marked(mark):
        try:
            process = psutil.Process(pid)
            times = process.cpu_times()
            if int(process.environ().get(NODE, 0)):
                of_nodes.add(pid)
        except psutil.Error:  # It has ended meanwhile.
            continue
        cpu[pid] = times.user + times.system
    sent = received = 0
    for line in _sockets():
        if of_nodes & {int(pid) for pid in re.findall(r"pid=(\d+)", line)}:
            sent += sum(map(int, _SENT.findall(line)))
            received += sum(map(int, _RECEIVED.findall(line)))
    return Seen(time.perf_counter(), cpu, sent, received)


def _sockets() -> list[str]:
    """Return what the kernel says of each open connection over TCP, one line each."""
    command = ["ss", "--tcp", "--info", "--processes", "--no-header", "--oneline"]
    done: subprocess.CompletedProcess[Any] = subprocess.run(
        command, capture_output=True, text=True, check=True
    )
    return list(done.stdout.splitlines())
