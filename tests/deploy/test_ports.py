"""Ports that are taken: one sentence before Flower starts, and who has them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.deploy import ports
from fedlora_flwr.deploy.check import node_port
from fedlora_flwr.deploy.supernode import arguments_of
from tests.deploy.support import texts

HOLDS = (
    "import os, sys; from pathlib import Path; from fedlora_flwr.deploy.ports import claim; "
    "claim(Path(sys.argv[1])); os.execvp('sh', ['sh', '-c', 'echo on; exec sleep 60'])"
)


def test_arguments_say_where_a_program_listens(fleet: Path) -> None:
    script = arguments_of(fleet / "devices" / "device-02" / "start.sh")
    assert ports.asked(script, {}) == ("127.0.0.1", 9501)
    assert ports.asked(script, {ports.NODE_PORT: "9600"}) == ("127.0.0.1", 9600)
    assert ports.asked(["--host", "0.0.0.0", "--port=80"], {}) == ("0.0.0.0", 80)
    assert ports.asked(["--host", "h"], {}) is None
    assert ports.asked(["--port", "many"], {}) is None
    assert ports.trouble("127.0.0.1", 70_000)


@pytest.mark.usefixtures("activated")
@pytest.mark.parametrize("command", ["serve", "start"])
def test_a_program_whose_port_is_taken_says_so_in_one_sentence(
    fleet: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "execve")  # Or this process would become a SuperNode.
    monkeypatch.chdir(fleet / "devices" / "device-01")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(app, ["deploy", command, "--port", str(port)])
    assert done.exit_code == 1
    said = " ".join(done.output.split())
    begin = f"Error: Port {port} of this machine cannot be used (Address already in use): "
    assert said.startswith(begin)
    assert ("FEDLORA_NODE_PORT=9510 ./start.sh" in said) == (command == "start")


def test_a_device_whose_own_supernode_has_the_port_is_in_order(
    fleet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = fleet / "devices" / "device-01"
    (device / "bin").mkdir()
    assert not ports.claimed(device / "bin")
    held = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(device / "bin")], stdout=subprocess.PIPE
    )
    with held, socket.create_server(("127.0.0.1", 0)) as taken:
        assert held.stdout is not None
        assert held.stdout.readline() == b"on\n"
        assert ports.claimed(device / "bin")
        subject = f"port {taken.getsockname()[1]}"
        monkeypatch.setenv(ports.NODE_PORT, subject.split()[1])
        good = texts(node_port(device), good=True)[subject]
        held.kill()
        held.wait()
        assert not ports.claimed(device / "bin")
        bad = texts(node_port(device), good=False)[subject]
    assert good == ["this device's SuperNode is running here"]
    assert bad == ["cannot be used: Address already in use"]
