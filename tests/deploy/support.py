"""Fleets, devices and bundles that several tests make."""

from __future__ import annotations

import socket
import ssl
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from fedlora_flwr.config import RunConfig
from fedlora_flwr.deploy.check import check_fleet
from fedlora_flwr.deploy.findings import Finding
from fedlora_flwr.deploy.fleet import Fleet, make_fleet, stated
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.superlink import free_port
from tests.backbones.checkpoints import write_split
from tests.deploy import faulty
from tests.tasks.texts import make_checkpoint, reviews, text_config


def findings(folder: Path, run: RunConfig | None = None) -> dict[bool, list[Finding]]:
    found = list(check_fleet(folder, run))
    return {good: [f for f in found if f.good is good] for good in (True, False)}


def answer_once(
    server: Path, port: int, times: int = 1, host: str = "127.0.0.1"
) -> tuple[str, int]:
    """Greet the next who comes, with a fleet's certificate; return where."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(server / "server.pem", server / "server.key")
    listener = socket.create_server((host, port))

    def serve() -> None:
        with listener:
            for _ in range(times):
                with (
                    suppress(OSError),  # Who does not trust it hangs up.
                    context.wrap_socket(listener.accept()[0], server_side=True) as made,
                ):
                    made.sendall(b"hello")

    Thread(target=serve, daemon=True).start()
    host, port = listener.getsockname()
    return host, port


def texts(found: Iterable[Finding], good: bool) -> dict[str, list[str]]:
    by_subject: dict[str, list[str]] = {}
    for one in found:
        if one.good is good:
            by_subject.setdefault(one.subject, []).append(one.text)
    return by_subject


def until(
    done: Callable[[], object], said: Callable[[], str] = str, patience: float = 300.0
) -> None:
    """Wait for something; if it does not come, show the end of what was said."""
    deadline = time.monotonic() + patience
    while not done():
        assert time.monotonic() < deadline, said()[-3000:]
        time.sleep(0.2)


NAMES = ["device-01", "device-02"]


WARM = NAMES[0]


SIZES = [30, 50]


def prepare(base: Path) -> RunConfig:
    """Write all records in one place, and each home's in its device's."""
    model = make_checkpoint("bert", base / "model")
    homes = [home for home, size in enumerate(SIZES) for _ in range(size)]
    rows = [{**row, "home": home} for row, home in zip(reviews(sum(SIZES)), homes, strict=True)]
    write_split(base / "all", "train", rows)
    write_split(base / "all", "validation", reviews(40, seed=1))
    config = planned(base, model)
    make_fleet(base / "fleet", Fleet(len(NAMES), port=free_port()), config)
    for home, name in enumerate(NAMES):
        folder = base / "fleet" / "devices" / name / "data"
        write_split(folder, "train", [row for row in rows if row["home"] == home])
    return config


def planned(base: Path, model: Path) -> RunConfig:
    return text_config(
        model, base / "all", num_classes=2, strategy="dp-lora", partitioner="natural-id",
        partition_column="home", num_clients=2, input_columns="text", batch_size=8, local_steps=2,
        num_rounds=2, weighting="inverse-noise", delta=1e-3, seed=7,
        reproducible=True, exact_passes=True,
    )  # fmt: skip


def prepare_faulty(base: Path, names: Sequence[str], records: int, **changes: Any) -> RunConfig:
    """Make a fleet whose devices, which share the records, have a folder each for their faults."""
    model, rows = make_checkpoint("bert", base / "model"), reviews(records)
    for split in ("train", "validation"):
        write_split(base / "public", split, rows[:20])
    config = text_config(
        model, base / "public", task=faulty.NAME, input_columns="text", num_classes=2, batch_size=8,
        num_rounds=4, num_clients=len(names), min_completion=0.25, delta=1e-3, epsilon=50.0,
        run_dir=str(base / "run"), **changes,
    )  # fmt: skip
    make_fleet(base / "fleet", Fleet(len(names), port=free_port()), config)
    for number, name in enumerate(names):
        device = base / "fleet" / "devices" / name
        write_split(device / "data", "train", rows[number :: len(names)])
        settings = (device / "device.toml").read_text().replace("1e-5", "1e-3")
        (device / "device.toml").write_text(settings)
        (base / name).mkdir()
    return config


@contextmanager
def own_cache(base: Path) -> Iterator[None]:
    """Give all processes a cache of their own below a folder, and this checkout's modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(base / "cache"))
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        yield


def set_up_devices(base: Path, reproducible: bool) -> None:
    """Give devices the names that simulated clients have: their random streams follow from it.

    One keeps a process between messages.
    """
    for home, name in enumerate(NAMES):
        lines = [
            f'client-id = "partition-{home:06d}"', 'dataset = "data"', 'state-dir = "state"',
            "epsilon = 8.0", "delta = 1e-3", 'ledger-scope = "run"',
            'weighting = "inverse-noise"', stated(planned(base, base / "model")),
            *["reproducible = true"] * reproducible, f"keep-warm = {600 * (name == WARM)}",
        ]  # fmt: skip
        (base / "fleet" / "devices" / name / "device.toml").write_text("\n".join(lines))


def of(config: RunConfig, run_dir: RunDirectory, num_rounds: int) -> RunConfig:
    return RunConfig.of(config.items(), {"run-dir": str(run_dir.path), "num-rounds": num_rounds})


def adapter(run_dir: RunDirectory) -> bytes:
    return (run_dir.adapter / "adapter_model.safetensors").read_bytes()


def packed(*files: tuple[str, bytes | str], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return buffer.getvalue()
