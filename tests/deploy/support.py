"""Fleets, devices and bundles that several tests make."""

from __future__ import annotations

import socket
import ssl
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from threading import Thread

from fedlora_flwr.config import RunConfig
from fedlora_flwr.deploy.check import check_fleet
from fedlora_flwr.deploy.findings import Finding
from fedlora_flwr.deploy.fleet import Fleet, make_fleet, stated
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.superlink import free_port
from tests.backbones.checkpoints import write_split
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
