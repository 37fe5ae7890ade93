"""A real fleet whose operator ships code of his own first, and then runs as a simulation does.

Nothing of that code runs on a device, and noise follows no server's seed. One fleet serves all of
it, since its processes take long to start.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread

import pytest
from safetensors.numpy import load

from benchmarks.running_fleet import RunningFleet, running
from fedlora_flwr.config import RunConfig
from fedlora_flwr.deploy.fleet import CONNECTION
from fedlora_flwr.deploy.identities import make_device_key
from fedlora_flwr.deploy.status import FleetStatus, fleet_status
from fedlora_flwr.deploy.supernode import START
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import prepare_run, run_in_process
from tests.deploy import hostile
from tests.deploy.hostile import write_hostile
from tests.deploy.support import NAMES, WARM, adapter, of, prepare, set_up_devices, until
from tests.tracking.support import NAMES as TRACKERS
from tests.tracking.support import mlflow_run, of_mlflow, of_tensorboard, of_wandb, written

pytestmark = pytest.mark.deploy
ROOT = Path(__file__).parents[2]
OWN, BARE = NAMES
"""Started by its own script; started by Flower's program alone."""
REFUSED = "The app bundle "
SIMULATED, SEEDED = "simulated", "seeded"
SHORT, FIRST, SECOND = "short", "first", "second"  # of one round
FIX = "ship the folder operator/app that `fedlora deploy init` writes."


@dataclass
class Story:
    """What is left when all has happened."""

    base: Path
    answers: dict[str, list[str]]
    repository: str
    honest: str
    alive: bool
    log: str
    looks: dict[str, FleetStatus]
    during: list[FleetStatus]

    def run(self, name: str) -> RunDirectory:
        return RunDirectory(self.base / name)

    def canaries(self, device: str) -> set[str]:
        return {path.name for path in (self.base / "canaries" / device).iterdir()}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    base = tmp_path_factory.mktemp("foreign")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(base / "cache"))
        patch.setenv("PYTHONPATH", str(ROOT))
        config = RunConfig.of(prepare(base).items(), {"min-completion": 1.0})
        for name, rounds in ((SIMULATED, 2), (SHORT, 1)):
            plan = prepare_run(RunConfig.of(config.items(), {"num-rounds": rounds}))
            run_in_process(plan, RunDirectory(base / name), lambda row: None)
        set_up_devices(base, reproducible=True)
        with running(base / "fleet", base / "operator", []) as fleet:
            yield play(base, fleet, config)


def play(base: Path, fleet: RunningFleet, config: RunConfig) -> Story:
    script = fleet.folder / "devices" / BARE / "start.sh"
    own = script.read_text()
    script.write_text(own.replace(START, "flower-supernode"))
    for name in NAMES:
        (base / "canaries" / name).mkdir(parents=True)
        folder = str(base / "canaries" / name)
        fleet.start(name, **{hostile.FOLDER: folder, "FLWR_HOME": str(base / f"home-{name}")})
    (base / "told").mkdir()
    for app in write_hostile(base / "apps", base / "told").values():
        said = fleet.operator("flwr", "run", app, CONNECTION)
        assert "Successfully started run" in said, said
    answers = {name: answer(base / "told" / name, fleet) for name, *_ in hostile.bundles()}
    repository = fleet.run(of(config, RunDirectory(base / "repository"), 1), app=ROOT)
    fleet.stop([BARE])
    script.write_text(own)
    fleet.start(BARE)
    looks = {"between": fleet_status(fleet.folder)}
    with looking(fleet.folder) as during:
        recorded = RunConfig.of(config.items(), {"trackers": ",".join(TRACKERS)})
        honest = fleet.run(of(recorded, RunDirectory(base / SEEDED), 2))
    looks |= {"after": fleet_status(fleet.folder), "server": fleet_status(fleet.folder / "server")}
    set_up_devices(base, reproducible=False)
    for name in (FIRST, SECOND):
        fleet.run(of(config, RunDirectory(base / name), 1))
    alive = fleet.processes[OWN].poll() is None
    fleet.stop([BARE])
    # As an operator does whose device gets a new key: the old one keeps its name.
    make_device_key(base / "told", OWN)
    key = base / "told" / "device.pub"
    again = fleet.operator("flwr", "supernode", "register", key, CONNECTION, "--name", OWN)
    assert "success" in again, again
    looks["one gone"] = fleet_status(fleet.folder)
    renewed = fleet.operator("fedlora", "deploy", "renew", fleet.folder, "--days", "30")
    assert "valid until" in renewed, renewed
    looks["renewed"] = fleet_status(fleet.folder)
    log = fleet.log(OWN).read_text()
    return Story(base, answers, repository, honest, alive, log, looks, during)


@contextmanager
def looking(folder: Path) -> Iterator[list[FleetStatus]]:
    """Look at a fleet each second while the block runs."""
    looks: list[FleetStatus] = []
    done = Event()

    def look() -> None:
        while not done.wait(1.0):
            looks.append(fleet_status(folder))

    thread = Thread(target=look)
    thread.start()
    try:
        yield looks
    finally:
        done.set()
        thread.join()


def answer(told: Path, fleet: RunningFleet) -> list[str]:
    until(told.exists, fleet.log(OWN).read_text, patience=90.0)
    found: list[str] = json.loads(told.read_text())
    return found


def test_nothing_of_a_foreign_bundle_is_imported_or_unpacked(story: Story) -> None:
    assert story.canaries(OWN) == set()
    assert not (story.base / f"home-{OWN}" / "apps").exists()
    # These bundles do harm: Flower's own program imports them.
    assert story.canaries(BARE) == {name for name, *_ in hostile.bundles()}
    assert (story.base / f"home-{BARE}" / "apps").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "shadows-the-package",
            "holds files besides its pyproject.toml: 'fedlora_flwr/__init__.py'",
        ),
        ("brings-its-own-client", "holds files besides its pyproject.toml: 'server.py'"),
        ("shadows-a-library", "holds files besides its pyproject.toml: 'conftest.py'"),
        (hostile.NAMED, "asks for the dependencies ['evil']"),
    ],
)
def test_the_operator_and_the_devices_owner_are_told_why(
    story: Story, name: str, reason: str
) -> None:
    (refusal,) = [text for text in story.answers[name] if text.startswith(REFUSED)]
    assert len(story.answers[name]) == 2
    assert reason in refusal
    assert refusal.endswith(FIX)
    assert refusal in story.log


def test_the_repository_as_the_app_fails_the_run_and_says_what_to_ship(story: Story) -> None:
    summary = RunDirectory(story.base / "repository").summary() or {}
    assert summary["status"] != "completed"
    assert FIX in story.repository


def test_an_honest_run_on_the_same_fleet_gives_the_arrays_of_the_simulation_bit_for_bit(
    story: Story,
) -> None:
    summary = story.run(SEEDED).summary()
    assert summary is not None, story.honest
    assert (summary["status"], summary["failures"]) == ("completed", 0)
    assert adapter(story.run(SEEDED)) == adapter(story.run(SIMULATED))
    devices = story.base / "fleet" / "devices"
    assert [path.parents[1].name for path in devices.glob("*/state/warm-????????")] == [WARM]
    assert story.alive


def test_a_fleet_reports_the_figures_of_the_simulation(story: Story) -> None:
    keys = {"round", "client", "epsilon", "steps", "weight", "accountant"}

    def figures(name: str) -> list[dict[str, object]]:
        return [{k: row[k] for k in keys} for row in story.run(name).rows("clients")]

    assert len(figures(SEEDED)) == 4
    assert figures(SEEDED) == figures(SIMULATED)
    losses = [
        [row["loss"] for row in story.run(name).rows("rounds")] for name in (SEEDED, SIMULATED)
    ]
    assert losses[0] == losses[1]


def test_trackers_record_at_the_server_and_on_no_device(story: Story) -> None:
    run = story.run(SEEDED).path
    for found in (of_tensorboard(run), of_mlflow(run), of_wandb(run)):
        assert {step for _, step in found} == {0, 1, 2}
        for row in written(run):
            for name in {"accuracy", "loss", "bytes_up"} & row.keys():
                assert found[name, row["round"]] == [pytest.approx(row[name])]
    assert mlflow_run(run)[1].info.status == "FINISHED"
    assert "remarks" in (summary := story.run(SEEDED).summary() or {})
    assert not [remark for remark in summary["remarks"] if remark.startswith("tracker")]
    for name in TRACKERS:
        assert not list((story.base / "fleet").rglob(f"{name}*")), name


def test_a_runs_seed_draws_no_devices_noise(story: Story) -> None:
    for name in (FIRST, SECOND):
        assert "reproducible = true" in (story.base / name / "config.toml").read_text()
    short, first, second = (load(adapter(story.run(name))) for name in (SHORT, FIRST, SECOND))
    assert short.keys() == first.keys() == second.keys()
    for one, other in ((first, second), (first, short), (second, short)):
        assert not any((one[name] == other[name]).all() for name in one)


def states(status: FleetStatus) -> dict[str, str]:
    assert not status.problem
    return {device.name: device.state for device in status.devices}


def test_devices_are_told_by_name_whether_they_are_connected(story: Story) -> None:
    assert states(story.looks["after"]) == {OWN: "online", BARE: "online"}
    gone = story.looks["one gone"]
    assert states(gone) == {OWN: "online", BARE: "offline"}
    seen = gone.devices[1].seen
    assert seen is not None
    assert 0 <= (datetime.now(UTC) - seen).total_seconds() < 600


def test_the_run_at_work_is_shown_with_its_rounds(story: Story) -> None:
    folder = story.run(SEEDED).path
    ours = [look for look in story.during if look.run and look.run.folder == str(folder)]
    at_work = [look.as_json()["run"] for look in ours if look.run and look.run.status == "running"]
    assert {told["status"] for told in at_work} == {"running"}
    rounds = [told["round"] for told in at_work if told["round"] is not None]
    assert rounds == sorted(rounds)
    assert {0, 1} <= {*rounds}
    assert {told["ended"] for told in at_work if told["round"] == 1} == {None}


def test_between_runs_the_last_one_and_its_end_are_shown(story: Story) -> None:
    between = story.looks["between"].as_json()["run"]
    assert between["status"] == "finished:failed"
    assert FIX in between["ended"]
    after = story.looks["after"].as_json()["run"]
    assert (after["status"], after["ended"]) == ("finished:completed", "all rounds are done")
    assert (after["round"], after["num_rounds"], after["failures"]) == (2, 2, 0)
    rows = story.run(SEEDED).rows("rounds")
    assert (after["metric"], after["value"]) == ("accuracy", rows[-1]["accuracy"])


def test_a_devices_budget_is_what_its_reply_said_and_what_its_ledger_holds(story: Story) -> None:
    names = [f"partition-{home:06d}" for home in range(2)]
    said = {row["client"]: row["epsilon"] for row in story.run(SEEDED).rows("clients")}
    for look in ("after", "server"):
        devices = story.looks[look].devices
        assert [device.client for device in devices] == names
        for device in devices:
            assert (device.round, device.epsilon_budget) == (2, 8.0)
            assert device.epsilon == said[device.client]
            assert device.budget_left == pytest.approx(8.0 - said[device.client])


def test_the_server_itself_needs_no_fleets_folder(story: Story) -> None:
    ours, server = story.looks["after"].as_json(), story.looks["server"].as_json()
    assert [one["good"] for one in server["certificates"]] == [True, True]
    assert server["run"] == ours["run"]
    for one, other in zip(ours["devices"], server["devices"], strict=True):
        assert {**one, "seen": None} == {**other, "seen": None}


def test_a_server_that_still_uses_an_old_certificate_is_told(story: Story) -> None:
    assert len(story.looks["one gone"].certificates) == 2
    *_, renewed, used = story.looks["renewed"].certificates
    assert (used.end - renewed.end).days > 300
    assert (used.subject, used.fix.split(", and ")[-1]) == (
        "certificate that the server uses", "start the server again"
    )  # fmt: skip
