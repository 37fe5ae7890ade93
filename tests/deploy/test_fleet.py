from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread

import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.config import RunConfig
from fedlora_flwr.deploy import check as checks
from fedlora_flwr.deploy.check import Finding, check_device, check_fleet
from fedlora_flwr.deploy.fleet import Fleet, make_fleet, read_fleet, stated
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.privacy.budget import Segment
from fedlora_flwr.privacy.ledger import Account, Ledger
from fedlora_flwr.simulations.superlink import free_port
from tests.backbones.checkpoints import write_split
from tests.tasks.texts import make_checkpoint, reviews, text_config


@pytest.fixture(autouse=True)
def activated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find commands as in a shell in which the package's environment is active."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    make_fleet(tmp_path / "fleet", Fleet(2, port=free_port()))
    return tmp_path / "fleet"


def findings(folder: Path, run: RunConfig | None = None) -> dict[bool, list[Finding]]:
    found = list(check_fleet(folder, run))
    return {good: [f for f in found if f.good is good] for good in (True, False)}


def answer_once(server: Path, port: int) -> tuple[str, int]:
    """Greet the next who comes, with a fleet's certificate; return where."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(server / "server.pem", server / "server.key")
    listener = socket.create_server(("127.0.0.1", port))

    def serve() -> None:
        with (
            listener,
            suppress(OSError),  # Who does not trust it hangs up.
            context.wrap_socket(listener.accept()[0], server_side=True) as made,
        ):
            made.sendall(b"hello")

    Thread(target=serve, daemon=True).start()
    host, port = listener.getsockname()
    return host, port


def test_private_keys_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_fleet(tmp_path / "fleet", Fleet(3))
    finally:
        os.umask(before)
    keys = list((tmp_path / "fleet").rglob("*.key"))
    assert len(keys) == 5
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    texts = [file.read_bytes() for file in (tmp_path / "fleet").rglob("*") if file.is_file()]
    assert sum(b"PRIVATE KEY" in text for text in texts) == 5
    # Each folder is carried to a machine of its own, where the one around it protects nothing.
    for folder in ("server", "operator", "ca", "devices", *(f"devices/device-0{i}" for i in "123")):
        assert stat.S_IMODE((tmp_path / "fleet" / folder).stat().st_mode) == 0o700, folder


@pytest.mark.parametrize(
    ("folder", "program"),
    [("server", "flower-superlink"), ("devices/device-01", "fedlora")],
)
def test_what_a_script_starts_writes_for_its_user_alone(
    fleet: Path, tmp_path: Path, folder: str, program: str
) -> None:
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / program
    stand_in.write_text("#!/bin/sh\ntouch state.sqlite\nmkdir state\n")
    stand_in.chmod(0o755)
    subprocess.run(
        ["sh", "-c", 'umask 000; exec "$0"', fleet / folder / "start.sh"],
        env={"PATH": f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}"},
        check=True,
    )
    made = [
        stat.S_IMODE((fleet / folder / name).stat().st_mode) for name in ("state.sqlite", "state")
    ]
    assert made == [0o600, 0o700]


def test_other_programs_accept_certificates_and_keys(fleet: Path) -> None:
    server = fleet / "server"
    openssl = subprocess.run(
        ["openssl", "verify", "-CAfile", server / "ca.pem", server / "server.pem"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert openssl.stdout.strip().endswith("OK")
    address = answer_once(server, 0)
    device = ssl.create_default_context(cafile=str(fleet / "devices" / "device-01" / "ca.pem"))
    with (
        socket.create_connection(address) as plain,
        device.wrap_socket(plain, server_hostname="127.0.0.1") as made,
    ):
        assert made.recv(5) == b"hello"
    key = fleet / "devices" / "device-01" / "device.key"
    public = subprocess.run(
        ["ssh-keygen", "-y", "-f", key], capture_output=True, text=True, check=True
    ).stdout
    kept = (fleet / "operator" / "keys" / "device-01.pub").read_text()
    assert kept.split()[:2] == public.split()[:2]
    assert kept.split()[2] == "device-01"


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
def test_scripts_are_a_shells(fleet: Path) -> None:
    scripts = list(fleet.rglob("*.sh"))
    assert len(scripts) == 4
    for script in scripts:
        assert os.access(script, os.X_OK)
        subprocess.run(["sh", "-n", script], check=True)


def test_a_folder_in_use_is_left_alone(fleet: Path, tmp_path: Path) -> None:
    before = sorted(fleet.rglob("*"))
    with pytest.raises(InvalidValue, match="an empty folder"):
        make_fleet(fleet, Fleet(1))
    assert sorted(fleet.rglob("*")) == before
    assert read_fleet(fleet)[0].devices == 2
    assert [path.name for path in tmp_path.iterdir()] == ["fleet"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 0}, "devices = 0"),
        ({"port": 70_000}, "port = 70000"),
        ({"days": 0}, "days = 0"),
        ({"host": "a b"}, "host = 'a b'"),
        ({"host": "$(x)"}, "host"),
        ({"host": "server:1"}, "without a port"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidValue, match=message.replace("$", r"\$").replace("(", r"\(")):
        Fleet(**{"devices": 2, **changes})  # type: ignore[arg-type]


def test_what_listens_is_as_open_as_the_host() -> None:
    assert Fleet(1, "127.0.0.1").listen == Fleet(1, "localhost").listen == "127.0.0.1"
    assert Fleet(1, "10.0.0.5").listen == Fleet(1, "fleet.example.org").listen == "0.0.0.0"


def test_a_new_fleet_is_fit(fleet: Path) -> None:
    assert findings(fleet)[False] == []


def test_a_folder_that_is_no_fleets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="deploy init"):
        list(check_fleet(tmp_path))


def world_readable(fleet: Path) -> None:
    (fleet / "devices" / "device-02" / "device.key").chmod(0o644)


def swapped_keys(fleet: Path) -> None:
    one, two = (fleet / "devices" / f"device-0{i}" / "device.key" for i in (1, 2))
    one.write_bytes(two.read_bytes())


def other_ca(fleet: Path) -> None:
    make_fleet(fleet.parent / "other", Fleet(1))
    shutil.copy(fleet.parent / "other" / "server" / "ca.pem", fleet / "devices" / "device-01")


def other_server(fleet: Path) -> None:
    make_fleet(fleet.parent / "other", Fleet(1))
    for name in ("server.pem", "server.key"):
        shutil.copy(fleet.parent / "other" / "server" / name, fleet / "server" / name)


def broken_certificate(fleet: Path) -> None:
    (fleet / "server" / "server.pem").write_text("nothing")


def other_host(fleet: Path) -> None:
    manifest = json.loads((fleet / "fleet.json").read_text())
    manifest["fleet"]["host"] = "10.1.2.3"
    (fleet / "fleet.json").write_text(json.dumps(manifest))


def other_version(fleet: Path) -> None:
    manifest = json.loads((fleet / "fleet.json").read_text())
    manifest["versions"]["flwr"] = "1.0.0"
    (fleet / "fleet.json").write_text(json.dumps(manifest))


def unreadable_settings(fleet: Path) -> None:
    (fleet / "devices" / "device-02" / "device.toml").write_text("client-id = ")


def old_script(fleet: Path) -> None:
    script = fleet / "devices" / "device-01" / "start.sh"
    script.write_text(script.read_text().replace("fedlora deploy start", "flower-supernode"))


def key_with_a_passphrase(fleet: Path) -> None:
    key = fleet / "devices" / "device-01" / "device.key"
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-f", key], check=True)


def key_of_another_kind(fleet: Path) -> None:
    key = fleet / "devices" / "device-01" / "device.key"
    key.unlink()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    key.with_suffix(".key.pub").unlink()


def folder_for_a_certificate(fleet: Path) -> None:
    authority = fleet / "devices" / "device-01" / "ca.pem"
    authority.unlink()
    authority.mkdir()


def script_that_is_no_text(fleet: Path) -> None:
    (fleet / "devices" / "device-01" / "start.sh").write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    ("fault", "subject", "text"),
    [
        (key_with_a_passphrase, "devices/device-01/device.key", "cannot be read: .*assword"),
        (key_of_another_kind, "devices/device-01/device.key", "not the partner"),
        (folder_for_a_certificate, "server certificate", "IsADirectoryError"),
        (script_that_is_no_text, "device-01", "UnicodeDecodeError"),
        (world_readable, "devices/device-02/device.key", "mode 644"),
        (swapped_keys, "devices/device-01/device.key", "not the partner"),
        (other_ca, "ca.pem", "on device-01"),
        (other_server, "server certificate", "not signed by the CA"),
        (broken_certificate, "server certificate", "cannot be read"),
        (other_host, "server certificate", "holds for 127.0.0.1"),
        (other_version, "versions", "flwr .* here, 1.0.0 in the fleet"),
        (old_script, "device-01", "a server's code would run"),
        (unreadable_settings, "device-02", "readable TOML file"),
    ],
)
def test_each_fault_is_found_with_its_fix(
    fleet: Path, fault: Callable[[Path], None], subject: str, text: str
) -> None:
    fault(fleet)
    found = findings(fleet)
    bad = found[False]
    assert any(f.subject == subject and re.search(text, f.text) and f.fix for f in bad), bad
    # One fault hides no other: all that comes after it is looked at, too.
    subjects = {f.subject for f in (*bad, *found[True])}
    assert {"versions", "device-01", "device-02"} <= subjects


def test_certificates_that_end_soon_are_found(fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SOON", timedelta(days=400))
    bad = findings(fleet)[False]
    assert [f.subject for f in bad] == ["CA certificate", "server certificate"]
    assert all("soon over" in f.text for f in bad)


def test_a_port_in_use_is_found(fleet: Path) -> None:
    port = read_fleet(fleet)[0].port
    with socket.create_server(("127.0.0.1", port)):
        (bad,) = findings(fleet)[False]
    assert bad.subject == f"port {port}"


@pytest.fixture
def planned(fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Return a run whose model and records every device has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = make_checkpoint("bert", tmp_path / "model")
    config = text_config(
        model, tmp_path / "public", input_columns="text", num_classes=2, batch_size=8,
        local_steps=2, num_rounds=3, delta=1e-3,
    )  # fmt: skip
    rows = reviews(80)
    write_split(tmp_path / "public", "train", rows[:4])
    write_split(tmp_path / "public", "validation", rows[:4])
    for number, name in enumerate(("device-01", "device-02")):
        folder = fleet / "devices" / name
        write_split(folder / "data", "train", rows[number::2])
        settings = (folder / "device.toml").read_text().replace("1e-5", "1e-3")
        settings = settings.replace('task = "digits"\n', stated(config))
        (folder / "device.toml").write_text(settings)
    return config


def test_with_the_run_records_budget_and_model_are_looked_at(
    fleet: Path, planned: RunConfig
) -> None:
    found = findings(fleet, planned)
    assert found[False] == []
    texts = [f.text for f in found[True] if f.subject == "device-02"]
    assert any(text.startswith("40 records, ε ≤ 3 at δ = 0.001 with noise") for text in texts)
    assert "nothing spent yet" in texts
    assert any(text.startswith("backbone ") for text in texts)


def test_a_spent_budget_too_few_records_and_another_model_are_found(
    fleet: Path, planned: RunConfig, tmp_path: Path
) -> None:
    first, second = (fleet / "devices" / name for name in ("device-01", "device-02"))
    ledger = Ledger(first / "state" / "ledger.sqlite")
    spent = Segment(1.0, 0.2, 9)
    ledger.record(Account("device-01", "earlier", 99.0, 1e-3, "lifetime"), 1, spent, spent)
    make_checkpoint("roberta", second / "other")
    (second / "device.toml").write_text(
        (second / "device.toml")
        .read_text()
        .replace("delta = 1e-3", "delta = 0.1")
        .replace(f'model = "{tmp_path / "model"}"', 'model = "other"')
    )

    bad = {f.subject: [g.text for g in findings(fleet, planned)[False] if g.subject == f.subject]
           for f in findings(fleet, planned)[False]}  # fmt: skip

    assert "budget exhausted" in " ".join(bad["device-01"])
    assert "delta = 0.1" in " ".join(bad["device-02"])
    assert any("the server's is" in text or "lora-targets" in text for text in bad["device-02"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("no ledger"),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: path.unlink(),
        lambda path: path.with_name(f"{path.name}.witness").unlink(),
    ],
)
def test_a_damaged_ledger_is_a_finding(
    fleet: Path, planned: RunConfig, damage: Callable[[Path], object]
) -> None:
    path = fleet / "devices" / "device-01" / "state" / "ledger.sqlite"
    spent = Segment(1.0, 0.2, 9)
    Ledger(path).record(Account("device-01", "r", 99.0, 1e-3, "lifetime"), 1, spent, spent)
    damage(path)

    bad = [f for f in findings(fleet, planned)[False] if f.subject == "device-01"]

    assert len(bad) == 1
    assert str(path) in bad[0].text


@pytest.fixture
def on_device(fleet: Path, tmp_path: Path) -> Path:
    """Return the folder of a device, carried to where nothing else of the fleet is."""
    return Path(shutil.copytree(fleet / "devices" / "device-01", tmp_path / "away" / "device-01"))


def texts(found: Iterable[Finding], good: bool) -> dict[str, list[str]]:
    by_subject: dict[str, list[str]] = {}
    for one in found:
        if one.good is good:
            by_subject.setdefault(one.subject, []).append(one.text)
    return by_subject


def test_a_device_is_looked_at_where_it_is(
    fleet: Path, on_device: Path, planned: RunConfig
) -> None:
    shutil.copytree(
        fleet / "devices" / "device-01" / "data", on_device / "data", dirs_exist_ok=True
    )
    shutil.copy(fleet / "devices" / "device-01" / "device.toml", on_device)
    _, port = answer_once(fleet / "server", read_fleet(fleet)[0].port)

    found = list(check_device(on_device, planned))

    assert texts(found, good=False) == {}
    good = texts(found, good=True)
    assert good[f"server 127.0.0.1:{port}"] == ["answers with a certificate of ca.pem"]
    assert good["private keys"] == ["1 of mode 600, each fits its public key"]
    assert [text.split(" in ")[0] for text in good["start.sh"]] == [
        "runs only the code that is installed"
    ]
    assert any("records, ε ≤ 3" in text for text in good["device-01"])
    assert any(text.startswith("backbone ") for text in good["device-01"])
    # Who decides what here.
    assert good["epsilon"] == ["3.0, its file"]
    assert good["test-split"] == ["'', default: its file is silent"]
    assert good["partitioner"] == ["'iid', always"]
    assert good["clip-norm"][0].startswith("the run, a number from")


def test_a_ledger_in_the_users_data_folder_is_asked(
    fleet: Path, planned: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device whose file names no state-dir keeps its ledger there."""
    device = fleet / "devices" / "device-01"
    settings = (device / "device.toml").read_text().replace('state-dir = "state"\n', "")
    (device / "device.toml").write_text(settings)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    spent = Segment(9.0, 0.2, 9)
    account = Account("device-01", "r", 3.0, 1e-3, "lifetime")
    Ledger(tmp_path / "home" / "fedlora" / "ledger.sqlite").record(account, 1, spent, spent)

    here = texts(check_device(device, planned), good=True)["device-01"]
    away = [f.text for f in findings(fleet, planned)[True] if f.subject == "device-01"]

    assert any(re.match(r"ε = 0\.\d+ spent, ", text) for text in here), here
    assert "its ledger is on the device: its file names no state-dir" in away


def test_settings_that_undo_the_promise_are_found(fleet: Path) -> None:
    file = fleet / "devices" / "device-01" / "device.toml"
    lines = {
        "epsilon": ("inf", "no noise is added"),
        "reproducible": ("true", "follows the run's seed"),
        "report-unprotected-metrics": ("true", "the loss on the records"),
        "ledger-scope": ('"run"', "any number of runs"),
    }
    others = [one for one in file.read_text().splitlines() if one.split(" ")[0] not in lines]
    stated_now = [f"{key} = {value}" for key, (value, _) in lines.items()]
    file.write_text("\n".join([*stated_now, *others]))
    bad = findings(fleet)[False]
    assert {f.subject for f in bad} == {"device-01"}
    assert len(bad) == len(lines)
    for key, (_, text) in lines.items():
        assert any(f.text.startswith(f"{key} = ") and text in f.text for f in bad), key


def test_what_is_not_fit_on_a_device_is_found_there(
    fleet: Path, on_device: Path, planned: RunConfig, tmp_path: Path
) -> None:
    server = f"server 127.0.0.1:{read_fleet(fleet)[0].port}"
    (on_device / "device.key").chmod(0o644)
    bad = texts(check_device(on_device), good=False)
    assert bad["device.key"] == ["mode 644: others can read it"]
    assert bad[server] == ["does not answer: Connection refused"]

    make_fleet(tmp_path / "other", Fleet(1))
    answer_once(tmp_path / "other" / "server", read_fleet(fleet)[0].port)
    (found,) = texts(check_device(on_device), good=False)[server]
    assert "self-signed certificate" in found or "unable to get local issuer" in found

    (on_device / "device.toml").write_text(
        'client-id = "a"\nepsilon = 3.0\ndelta = 1e-3\ndataset = "nowhere"\n' + stated(planned)
    )
    found, *_ = texts(check_device(on_device, planned), good=False)["device-01"]
    assert "nowhere" in found


@pytest.mark.parametrize("form", ["text", "numbered"])
def test_classes_that_have_names_are_asked_for(
    fleet: Path, planned: RunConfig, tmp_path: Path, form: str
) -> None:
    """Each device would number them by its own data set, where it knows their number alone."""
    on_device = Path(shutil.copytree(fleet / "devices" / "device-01", tmp_path / "device-01"))
    (on_device / "data" / "train.jsonl").unlink()
    names, rows = ["good", "bad"], reviews(40)
    kind = Value("string") if form == "text" else ClassLabel(names=names)
    labels = [names[row["label"]] for row in rows]
    columns = {"text": [row["text"] for row in rows], "label": labels}
    features = Features({"text": Value("string"), "label": kind})
    table = Dataset.from_dict(columns, features=features).data.table
    pq.write_table(table, on_device / "data" / "train.parquet")

    found, *_ = texts(check_device(on_device, planned), good=False)["device-01"]
    order = sorted(names) if form == "text" else names
    assert found.startswith(f"class-names = '' cannot be used: expected the names {order}")
    text = (on_device / "device.toml").read_text()
    stated_names = text.replace("num-classes = 2", 'class-names = "bad,good"')
    assert stated_names != text
    (on_device / "device.toml").write_text(stated_names)
    assert "device-01" not in texts(check_device(on_device, planned), good=False)


def test_the_command_takes_either_folder(fleet: Path, on_device: Path) -> None:
    for folder, expected in ((fleet, 0), (on_device, 1)):  # Its server does not run.
        done = CliRunner().invoke(app, ["deploy", "check", str(folder)])
        assert done.exit_code == expected, done.output
    assert "FAIL server 127.0.0.1" in done.output
