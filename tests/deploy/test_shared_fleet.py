"""A real fleet whose operator ships code of his own first, and then runs as a simulation does.

Nothing of that code runs on a device, and noise follows no server's seed. One fleet serves all of
it, since its processes take long to start.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.numpy import load

from benchmarks.running_fleet import RunningFleet, running
from fedlora_flwr.config import RunConfig
from fedlora_flwr.deploy.fleet import CONNECTION
from fedlora_flwr.deploy.supernode import START
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import prepare_run, run_in_process
from tests.deploy import hostile
from tests.deploy.hostile import write_hostile
from tests.deploy.support import NAMES, WARM, adapter, of, prepare, set_up_devices, until

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
    honest = fleet.run(of(config, RunDirectory(base / SEEDED), 2))
    set_up_devices(base, reproducible=False)
    for name in (FIRST, SECOND):
        fleet.run(of(config, RunDirectory(base / name), 1))
    alive = fleet.processes[OWN].poll() is None
    return Story(base, answers, repository, honest, alive, fleet.log(OWN).read_text())


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


def test_a_runs_seed_draws_no_devices_noise(story: Story) -> None:
    for name in (FIRST, SECOND):
        assert "reproducible = true" in (story.base / name / "config.toml").read_text()
    short, first, second = (load(adapter(story.run(name))) for name in (SHORT, FIRST, SECOND))
    assert short.keys() == first.keys() == second.keys()
    for one, other in ((first, second), (first, short), (second, short)):
        assert not any((one[name] == other[name]).all() for name in one)
