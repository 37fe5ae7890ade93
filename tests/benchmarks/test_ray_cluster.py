"""What the benchmark of Ray clusters counts; the clusters are in simulations/test_ray_cluster."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.marked import MARK
from benchmarks.ray_cluster import NODE, Measured, bytes_of_records, figures, recipe, seen

RECEIVES = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as connection:
    connection.recv(100_000, socket.MSG_WAITALL)
    connection.sendall(bytes(10))
    sys.stdin.read()
"""
ALONE = Measured(
    start=20.0, start_cpu=25.0, seconds=4.0, cpu=3.0, sent=0, received=0, up=4e6, down=8e6, reads={}
)


def test_bytes_are_those_of_the_nodes_beside_the_first(tmp_path: Path) -> None:
    mark, connections = str(tmp_path), []
    processes: list[subprocess.Popen[bytes]] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        try:
            for node in range(3):
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", RECEIVES, str(server.getsockname()[1])],
                        env={**os.environ, MARK: mark, NODE: str(node)},
                        stdin=subprocess.PIPE,
                    )
                )
                connections.append(server.accept()[0])
            for connection in connections:
                connection.sendall(bytes(100_000))
                connection.recv(10, socket.MSG_WAITALL)
            found = seen(mark)
        finally:
            for connection in connections:
                connection.close()
            for process in processes:
                process.communicate(timeout=60)
    # The kernel may count the opening of a connection as a byte.
    assert found.received == pytest.approx(200_000, abs=2)
    assert found.sent == pytest.approx(20, abs=2)
    assert found.cpu.keys() == {process.pid for process in processes}
    assert found.cpu_since(replace(found, cpu={})) == sum(found.cpu.values()) > 0


def test_efficiency_is_the_time_alone_over_that_of_all_nodes() -> None:
    four = replace(ALONE, seconds=2.0, sent=3.3e6, received=6.6e6)
    told = {figure.what: figure for figure in figures("4", 4, four, ALONE)}
    assert told["4: a round"].against == "one node; efficiency 0.50"
    # Each of the three further nodes serves a quarter of the clients.
    down, up = (told[f"4: {way} each further node per round"] for way in ("to", "from"))
    assert (down.ours, down.reference) == pytest.approx((2200, 2000))
    assert (up.ours, up.reference) == pytest.approx((1100, 1000))
    assert not any("further" in figure.what for figure in figures("1", 1, ALONE, ALONE))


def test_records_are_counted_as_tensors() -> None:
    # 8 clients with the same 64 texts: 13 tokens, 13 marks and a label of 8 bytes each.
    assert bytes_of_records(recipe("texts", 8, 2)) == 8 * 64 * (13 + 13 + 1) * 8
