"""docs/deployment.md to the letter: its commands, on four machines that are folders of this one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import textwrap
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from benchmarks.running_fleet import BIN, RunningFleet
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.superlink import QUIET, free_port
from tests.backbones.checkpoints import write_split
from tests.tasks.texts import make_checkpoint, reviews

pytestmark = pytest.mark.deploy
ROOT = Path(__file__).parents[2]
DEVICES = ("device-01", "device-02")
SERVER, OPERATOR = "127.0.0.1", "operator"
MACHINES = (OPERATOR, SERVER, *DEVICES)
# Copies to another machine's home: this machine's folder of that name.
SCP = '#!/bin/sh\nset -eu\ncp -pr "$2" "{machines}/${{3%%:*}}/"\n'


@dataclass(frozen=True)
class Block:
    """Fenced lines of the document."""

    language: str
    text: str

    @property
    def machines(self) -> list[str]:
        """Whose shell its first line names."""
        first = self.text.splitlines()[0]
        if "every machine" in first:
            return list(MACHINES)
        named = [name for name in DEVICES if name in first]
        return named or [SERVER if "the server" in first else OPERATOR]


def blocks() -> list[Block]:
    """Read the section that ends with a finished run."""
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    section = page.split("## From empty machines to a finished run")[1].split("\n## ")[0]
    found = re.findall(r"^ *```(\w+)\n(.*?)^ *```$", section, re.MULTILINE | re.DOTALL)
    return [Block(language, textwrap.dedent(text)) for language, text in found]


@dataclass
class Machines:
    """Four machines: a folder each, with a home of its own and what the document finds there."""

    folder: Path
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        for name in MACHINES:
            (self.folder / name / ".flwr").mkdir(parents=True)
        (self.folder / "bin").mkdir()
        scp = self.folder / "bin" / "scp"
        scp.write_text(SCP.format(machines=self.folder))
        scp.chmod(0o755)
        home = self.folder / OPERATOR
        self.fleet = RunningFleet(home / "fleet", home / ".flwr")

    def here(self, text: str, machine: str) -> str:
        """Put this machine's host, port and folders in the place of the document's."""
        own = "records" if machine not in DEVICES else f"records-{machine}"
        text = text.replace("fleet.example.org", SERVER).replace("9443", str(self.port))
        text = text.replace("/srv/records", f"/srv/{own}").replace("/srv/", f"{self.folder}/srv/")
        return text.replace("device-01", machine) if machine == "device-02" else text

    def shell(self, line: str, machine: str) -> str:
        """Run lines in a machine's shell, in which its environment is active."""
        done = subprocess.run(
            ["bash", "-ec", line], cwd=self.folder / machine, env=self.env(machine),
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{machine}: {line}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def start(self, script: str, machine: str) -> None:
        """Start what stays in the foreground."""
        name = "server" if machine == SERVER else machine
        with self.fleet.log(name).open("ab") as log:
            self.fleet.processes[name] = subprocess.Popen(
                ["bash", "-ec", f"exec {script}"], cwd=self.folder / machine, stdout=log,
                stderr=log, start_new_session=True, env=self.env(machine),
            )  # fmt: skip
        if name == "server":
            self.fleet.wait_for_server()

    def env(self, machine: str) -> dict[str, str]:
        """What a machine's shell knows after ``. venv/bin/activate``."""
        home = self.folder / machine
        path = (home / "venv" / "bin", self.folder / "bin", "/usr/local/bin", "/usr/bin", "/bin")
        kept = {key: value for key, value in os.environ.items() if not key.startswith("FLWR_")}
        quiet = {key: value for key, value in QUIET.items() if "INSTALLATION" not in key}
        return {
            **kept, **quiet, "HOME": str(home), "FLWR_HOME": str(home / ".flwr"),
            "PATH": os.pathsep.join(map(str, path)), "PYTHONPATH": "", "OMP_NUM_THREADS": "1",
            "FEDLORA_NODE_PORT": str(free_port()),
            "XDG_CACHE_HOME": str(self.folder / "cache"), "XDG_DATA_HOME": str(home / "data"),
        }  # fmt: skip

    def install(self, text: str, machine: str) -> None:
        """Install as the document says, with this environment's dependencies: 6 GB less."""
        environment = self.folder / machine / "venv"
        base = {"PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        done = subprocess.run(
            ["bash", "-ec", text], cwd=environment.parent, capture_output=True, text=True,
            env={**self.env(machine), "PATH": f"{BIN}:{os.environ['PATH']}", **base}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        packages = sysconfig.get_path("purelib")
        inner = environment / Path(packages).relative_to(sys.prefix)
        (inner / "dependencies.pth").write_text(packages + "\n")
        for script in (path for path in BIN.glob("fl*") if path.is_file()):
            copy = environment / "bin" / script.name
            copy.write_text(f"#!{environment}/bin/python\n{script.read_text()}")
            copy.chmod(0o755)


def provide(machines: Machines) -> None:
    """Put what the document takes for granted on the machines: below /srv."""
    srv = machines.folder / "srv"
    srv.mkdir()
    (srv / "fedlora-flwr").symlink_to(ROOT)
    make_checkpoint("bert", srv / "model")
    rows = reviews(90)
    write_split(srv / "public", "validation", rows[80:])
    for device, part in zip(DEVICES, (rows[:30], rows[30:80]), strict=True):
        write_split(srv / f"records-{device}", "train", part)
    wheel = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(srv)]
    subprocess.run(wheel, cwd=ROOT, capture_output=True, check=True)


@contextmanager
def followed(machines: Machines) -> Iterator[str]:
    """Do what the document says, in its order; give all that was printed, processes alive."""
    said = []
    try:
        for block in blocks():
            if block.language == "toml":
                recipe = machines.folder / OPERATOR / "recipe.toml"
                recipe.write_text(machines.here(block.text, OPERATOR))
                continue
            for machine in block.machines:
                text = machines.here(block.text, machine)
                if "venv/bin/pip" in text:
                    machines.install(text, machine)
                    continue
                stays = text.splitlines()[-1].endswith("start.sh")
                *lines, last = text.splitlines() if stays else [*text.splitlines(), ""]
                said.append(machines.shell("\n".join(lines), machine))
                if stays:
                    machines.start(last, machine)
        yield "\n".join(said)
    finally:
        fleet = machines.fleet
        fleet.stop([name for name in list(fleet.processes) if name != "server"])
        fleet.stop(list(fleet.processes))


def listening(process: subprocess.Popen[bytes]) -> set[tuple[str, int]]:
    """Return the addresses that a process and its children listen on."""
    parent = psutil.Process(process.pid)
    return {
        (found.laddr.ip, found.laddr.port)
        for one in (parent, *parent.children(recursive=True))
        for found in one.net_connections("inet")
        if found.status == psutil.CONN_LISTEN
    }


def test_the_document_leads_from_empty_machines_to_a_finished_run(tmp_path: Path) -> None:
    machines = Machines(tmp_path / "machines")
    provide(machines)

    with followed(machines) as said:
        ports = {name: listening(p) for name, p in machines.fleet.processes.items()}
        connections = machines.folder / OPERATOR / ".flwr" / "config.toml"
        operators = tomllib.loads(connections.read_text())["superlink"]["fedlora-fleet"]
        with connections.open("a") as more:
            more.write(f'\n[superlink.stranger]\naddress = "{operators["address"]}"\n')
        refused = machines.shell("flwr list stranger 2>&1 || true", OPERATOR)

    assert '"status": "finished:completed"' in said, said
    run = RunDirectory(machines.folder / "srv" / "run")
    summary = run.summary()
    assert summary is not None
    assert (summary["status"], summary["failures"]) == ("completed", 0)
    assert {row["client"] for row in run.rows("clients")} == set(DEVICES)
    # The server evaluates; each device spends what its own file allows, and writes it down.
    assert [row["round"] for row in run.rows("rounds") if "accuracy" in row] == [0, 1, 2]
    assert 0 < summary["epsilon_max"] <= 4.0
    for device in DEVICES:
        assert (machines.folder / device / device / "state" / "ledger.sqlite").exists()
    # What the document says of ports.
    assert ports["server"] == {(SERVER, machines.port)}
    for device in DEVICES:
        assert ports[device]
        assert {address for address, _ in ports[device]} == {"127.0.0.1"}
    # All that the operator has is the CA certificate, by which Flower's command knows the server.
    assert operators.keys() == {"address", "root-certificates"}
    assert "Connection to the SuperLink is unavailable" in refused


def test_the_block_for_one_machine_makes_a_fleet_that_is_fit(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    tutorial = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    for name in ("make_reviews.py", "make_model.py"):
        code = re.findall(rf"^```python\n# {name}\n(.*?)^```$", tutorial, re.MULTILINE | re.DOTALL)
        (tmp_path / name).write_text(code[0])
        subprocess.run([sys.executable, name], cwd=tmp_path, check=True)
    (recipe,) = (block.text for block in blocks() if block.language == "toml")
    (tmp_path / "recipe.toml").write_text(recipe)
    section = page.split("## On one machine")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        ["bash", "-ec", block.replace("9443", str(free_port()))], cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path), "PATH": f"{BIN}:{os.environ['PATH']}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok   device-02: 1000 records, ε ≤ 4" in done.stdout
    assert "FAIL" not in done.stdout
    assert (tmp_path / ".flwr" / "config.toml").exists()
