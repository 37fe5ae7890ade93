"""A Ray cluster of several nodes on this machine's loopback, in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from fedlora_flwr.simulations.superlink import LOOPBACK, QUIET

STORE = 100_000_000
"""Bytes of each node's object store."""


@contextmanager
def running_cluster(nodes: Sequence[Mapping[str, str]]) -> Iterator[dict[str, str]]:
    """Start a cluster, give the variables by which a run finds it, and end it.

    Parameters
    ----------
    nodes : Sequence[Mapping]
        One mapping per node, the head first: variables of that node's environment. Each node has
        one CPU.
    """
    # A short path, for sockets lie below it; and not Ray's own, where all runs look for a cluster.
    traces = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, json.dumps([dict(node) for node in nodes])],
        env={**os.environ, **QUIET, **LOOPBACK, "RAY_TMPDIR": traces},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        if not (address := process.stdout.readline().strip()):
            raise RuntimeError("The Ray cluster did not start; it says why above.")
        yield {"RAY_ADDRESS": address, **LOOPBACK}
    finally:
        process.communicate(timeout=60)  # It ends when its input does.
        shutil.rmtree(traces, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Start a Ray cluster on loopback, print its address, and end it when the input ends."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.running_cluster", description=main.__doc__
    )
    parser.add_argument("nodes", type=json.loads, help="JSON: variables of each node, head first")
    given = parser.parse_args(arguments)
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for variables in given.nodes:
        cluster.add_node(
            num_cpus=1,
            node_ip_address="127.0.0.1",
            include_dashboard=False,
            object_store_memory=STORE,
            env_vars=variables,
        )
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
