"""`fedlora deploy check` on a device."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.clients.device import Device
from fedlora_flwr.config import RunConfig
from fedlora_flwr.deploy.check import check_device, keys_in_force
from fedlora_flwr.deploy.device_check import device_findings
from fedlora_flwr.deploy.fleet import Fleet, make_fleet, read_fleet, stated
from fedlora_flwr.errors import BudgetExhausted
from fedlora_flwr.privacy.budget import Segment
from fedlora_flwr.privacy.calibration import calibrated_mechanism
from fedlora_flwr.privacy.ledger import Account, Ledger
from tests.deploy.support import answer_once, findings, texts
from tests.tasks.texts import reviews

pytestmark = pytest.mark.usefixtures("activated")


@pytest.fixture
def on_device(fleet: Path, tmp_path: Path) -> Path:
    """Return the folder of a device, carried to where nothing else of the fleet is."""
    return Path(shutil.copytree(fleet / "devices" / "device-01", tmp_path / "away" / "device-01"))


def test_a_device_is_looked_at_where_it_is(
    fleet: Path, on_device: Path, planned: RunConfig
) -> None:
    shutil.copytree(
        fleet / "devices" / "device-01" / "data", on_device / "data", dirs_exist_ok=True
    )
    shutil.copy(fleet / "devices" / "device-01" / "device.toml", on_device)

    found = list(check_device(on_device, planned))

    # `test_refused` has a server that runs.
    server = f"server 127.0.0.1:{read_fleet(fleet)[0].port}"
    assert texts(found, good=False).keys() == {server}
    good = texts(found, good=True)
    assert good["private keys"] == ["1 with mode 600; each matches its public key"]
    assert [text.split(" in ")[0] for text in good["start.sh"]] == [
        "runs only the code that is installed"
    ]
    assert any("records, ε ≤ 3" in text for text in good["device-01"])
    assert any(text.startswith("backbone ") for text in good["device-01"])
    assert good["port 9500"] == ["free on 127.0.0.1"]


def test_who_decides_what_here_is_listed_on_demand(
    fleet: Path, on_device: Path, planned: RunConfig
) -> None:
    shutil.copy(fleet / "devices" / "device-01" / "device.toml", on_device)
    assert planned.task in (on_device / "device.toml").read_text()
    good = texts(keys_in_force(on_device), good=True)
    assert good["privacy.epsilon"] == ["3.0, its file"]
    assert good["data.test-split"] == ["'', default, not set in its file"]
    assert good["partition.partitioner"] == ["'iid', always"]
    assert good["privacy.clip-norm"][0].startswith("the run, a number from")


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

    assert any(re.match(r"ε = 0\.\d+ spent; [\d.]+ of 3 after this run", text) for text in here), (
        here
    )
    assert "its ledger is on the device, since its device.toml has no state-dir" in away


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
    (on_device / "device.pub").rename(on_device / "device.key.pub")
    (bad_key,) = (f for f in check_device(on_device) if f.subject == "device.key")
    assert "device.pub" in bad_key.text
    assert "ssh-keygen -y" in bad_key.fix
    (on_device / "device.key.pub").rename(on_device / "device.pub")
    (on_device / "device.key").chmod(0o644)
    bad = texts(check_device(on_device), good=False)
    assert bad["device.key"] == ["mode 644: others can read it"]
    assert bad[server][0].startswith("nothing answers at 127.0.0.1:")

    make_fleet(tmp_path / "other", Fleet(1))
    answer_once(tmp_path / "other" / "server", read_fleet(fleet)[0].port)
    (found,) = texts(check_device(on_device), good=False)[server]
    assert "is not signed by the authority of ca.pem" in found

    (on_device / "device.toml").write_text(
        'client-id = "a"\nepsilon = 3.0\ndelta = 1e-3\ndataset = "nowhere"\n' + stated(planned)
    )
    found, *_ = texts(check_device(on_device, planned), good=False)["device-01"]
    assert "nowhere" in found


def test_records_that_are_not_there_are_found_without_a_recipe(
    fleet: Path, planned: RunConfig
) -> None:
    device = fleet / "devices" / "device-01"
    file = device / "device.toml"

    def look(good: bool) -> list[str]:
        found = device_findings(device, device.name, None, None, here=True)
        return texts(found, good).get(device.name, [])

    def bad(dataset: str) -> list[str]:
        file.write_text(re.sub("dataset = .*", f'dataset = "{dataset}"', settings))
        return look(good=False)

    settings = file.read_text()
    assert f"dataset is at {device / 'data'}" in look(good=True)
    assert bad("data") == []
    assert bad("owner/name") == []  # The hub may have it.
    for missing in ("nowhere", "data/nowhere", "./nowhere", "a/b/nowhere", "~/nowhere", "/nowhere"):
        (found,) = bad(missing)
        assert found.startswith(f"dataset = '{missing}', but /")
        assert found.endswith("nowhere does not exist")
    (device / "data" / "train.jsonl").rename(device / "data" / "other.jsonl")
    (found,) = bad("data")
    assert found.startswith("train-split = 'train' cannot be used: expected one of 'other'")
    with file.open("a") as more:
        more.write('train-split = "other"\n')
    assert look(good=False) == []
    # The commands look at it, too.
    shutil.rmtree(device / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(os, "execve")  # Or this process would become a SuperNode.
        patch.chdir(device)
        started = CliRunner().invoke(app, ["deploy", "start"])
    assert started.exit_code == 1
    assert started.output.startswith("Error: device.toml: dataset = 'data', but /")
    assert "does not exist. To fix: put it there, or correct dataset in " in started.output
    (found, *_) = texts(check_device(device), good=False)[device.name]
    assert found.startswith("dataset = 'data', but ")


@pytest.mark.parametrize("recipe", [False, True])
@pytest.mark.parametrize("key", ["label-column", "input-columns"])
def test_a_column_that_is_not_there_is_named_with_its_key_and_what_the_file_has(
    fleet: Path, planned: RunConfig, key: str, recipe: bool
) -> None:
    device = fleet / "devices" / "device-01"
    file = device / "device.toml"
    others = [line for line in file.read_text().splitlines() if not line.startswith(key)]
    file.write_text("\n".join([*others, f'{key} = "nothing"']))
    run = planned if recipe else None
    every = device_findings(device, "device-01", run, None, here=True)
    (found,) = (one for one in every if not one.good)
    assert found.text.startswith(f"{key} = 'nothing' cannot be used: expected ")
    assert "'text'" in found.text
    assert found.fix == f"correct {key} in {file}"


def test_what_a_run_costs_is_said_before_the_first_and_comes_true(
    fleet: Path, planned: RunConfig
) -> None:
    """Also what the run costs alone, and how many more runs like it fit."""
    device = fleet / "devices" / "device-01"
    with (device / "device.toml").open("a") as file:
        file.write("run-epsilon = 1.5\n")

    def said() -> tuple[str, ...]:
        found = texts(device_findings(device, "device-01", planned, None, here=True), good=True)
        (text,) = (text for text in found["device-01"] if "after this run" in text)
        pattern = r"(.+); ([\d.]+) of 3 after this run \(this run alone: ([\d.]+)\)\. After it (.+)"
        match = re.fullmatch(pattern, text)
        assert match, text
        return match.groups()

    before, after, alone, more = said()
    assert (before, alone) == ("nothing spent yet", "1.5")
    config = Device.read(device / "device.toml").config(planned.items())
    ledger, count = Ledger(device / "state" / "ledger.sqlite"), 0
    while True:
        account = Account("device-01", f"run-{count}", 3.0, 1e-3, "lifetime", 1.5)
        noise = calibrated_mechanism(config, 40, terms=ledger.terms(account))
        plan = Segment(noise.noise_multiplier, noise.sample_rate, config.planned_steps)
        try:
            ledger.record(account, 1, plan, plan)
        except BudgetExhausted:
            break
        count += 1
        if count == 1:
            assert f"{ledger.summary(account).epsilon:.3g}" == after
            assert said()[0] == f"ε = {after} spent"
    assert count > 1
    assert more.startswith(f"{count - 1} more run" if count > 1 else "no more run")
    (bad,) = texts(device_findings(device, "device-01", planned, None, here=True), False).values()
    assert bad[0].startswith("budget exhausted: ")


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
        assert "privacy.epsilon" not in done.output
    assert "FAIL server 127.0.0.1" in done.output
    listed = CliRunner().invoke(app, ["deploy", "check", str(on_device), "--keys"])
    assert "ok   privacy.epsilon: 3.0, its file" in listed.output
    refused = CliRunner().invoke(app, ["deploy", "check", str(fleet), "--keys"])
    assert "expected the folder of a device, with device.toml" in " ".join(refused.output.split())
