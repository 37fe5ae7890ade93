"""Real runs: a SuperLink, Flower's simulation engine, Ray workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlora_flwr.config import RunConfig
from fedlora_flwr.server.rounds import RoundRow
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import (
    RunFailed,
    prepare_run,
    run_in_process,
    run_on_flower,
)
from fedlora_flwr.simulations.superlink import SimulationSuperLink, free_port
from tests.processes.processes import LOOPBACK, MARK, left_of, listening, marked
from tests.server.support import digests, only_run
from tests.simulations.in_turn import RECIPES, write_app
from tests.support.readme import BIN, FLOWER, ROOT, unactivated
from tests.tracking.support import of_tensorboard, written

pytestmark = pytest.mark.flower
FEDLORA = str(Path(sys.executable).parent / "fedlora")
# What differs on the way: one factor or both, scores, ranks, folded pairs, what stays on disk.
ON_RAY = ("dp-lora", "rolora", "as-lora", "flexlora", "flora", "fedsa-lora")
SMALL = {
    "num-clients": 4,
    "num-rounds": 2,
    "local-steps": 2,
    "lora-dropout": 0.1,
    "reproducible": True,
}


def config(strategy: str) -> RunConfig:
    return RunConfig.of(SMALL, {"strategy": strategy})


def adapter(run: Path) -> dict[str, Any]:
    return dict(load_file(run / "adapter" / "adapter_model.safetensors"))


def ignore(row: RoundRow) -> None:
    assert "round" in row


@pytest.fixture(scope="module")
def flower_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run each strategy once under `flwr run`, all of them on the same two workers."""
    folder = tmp_path_factory.mktemp("runs")
    found, recipes = {strategy: folder / strategy for strategy in ON_RAY}, []
    for strategy, path in found.items():
        own = {"run-dir": str(path), "state-dir": str(path), "min-clients": SMALL["num-clients"],
               "trackers": "tensorboard"}  # fmt: skip
        recipes.append(str(folder / f"{strategy}.toml"))
        text = RunConfig.of(config(strategy).items(), own).to_toml()
        Path(recipes[-1]).write_text(text, encoding="utf-8")
    log_file = folder / "log"
    with log_file.open("w") as log, SimulationSuperLink(log, modules=ROOT) as superlink:
        overrides = superlink.file("run.toml", f"{RECIPES} = '{json.dumps(recipes)}'\n")
        workers = "num-supernodes=4 client-resources-num-cpus=1 init-args-num-cpus=2"
        superlink.submit(write_app(folder / "app"), overrides, workers)
        while not superlink.log_ended:  # Each question for the status costs seconds of a processor.
            time.sleep(0.2)
        while not (status := superlink.status()).startswith("finished"):
            time.sleep(0.5)
    assert status == "finished:completed", log_file.read_text()
    for path in found.values():
        assert json.loads((path / "summary.json").read_text())["status"] == "completed"
        assert [row["round"] for row in RunDirectory(path).rows("rounds")] == [0, 1, 2]
    return found


@pytest.mark.parametrize("strategy", ON_RAY)
def test_a_run_on_ray_equals_the_run_in_this_process_bit_for_bit(
    flower_runs: dict[str, Path], strategy: str, tmp_path: Path
) -> None:
    local = RunDirectory(tmp_path / "local")
    run_in_process(prepare_run(config(strategy)), local, ignore)
    on_ray, here = adapter(flower_runs[strategy]), adapter(local.path)
    assert on_ray.keys() == here.keys()
    for name, array in on_ray.items():
        np.testing.assert_array_equal(array, here[name], err_msg=name)


def test_the_server_of_flwr_run_tells_trackers_of_each_round(flower_runs: dict[str, Path]) -> None:
    run = flower_runs["rolora"]
    scalars = of_tensorboard(run)
    for row in written(run):
        assert scalars["accuracy", row["round"]] == [pytest.approx(row["accuracy"])]
    assert {step for _, step in scalars} == {0, 1, 2}


def test_a_run_repeats_a_simulation_on_one_worker_and_listens_on_the_loopback_alone(
    flower_runs: dict[str, Path], tmp_path: Path
) -> None:
    """From the recipe that the simulation wrote, by the command."""
    first, runs = RunDirectory(tmp_path / "first"), tmp_path / "runs"
    run_in_process(prepare_run(config("rolora")), first, ignore)
    before = digests(first.path)
    command = [FEDLORA, "run", str(first.path / "config.toml"), "--workers", "1"]
    found: set[str] = set()
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [*command, "--output", str(runs)],
            env={**os.environ, MARK: str(tmp_path)}, stdout=said, stderr=said,
        )  # fmt: skip
        while process.poll() is None:
            found |= listening(marked(str(tmp_path)))
            time.sleep(0.2)
    assert process.returncode == 0, (tmp_path / "said").read_text()
    assert len(found) >= 2  # The SuperLink's, and Ray's.
    assert found <= LOOPBACK
    assert digests(first.path) == before
    second = only_run(runs)
    summary = json.loads((second / "summary.json").read_text())
    assert summary["status"] == "completed"
    # The start of this command tells the server, in another process, how much noise clients add.
    assert summary["robust"] == "norm-bound"
    one, two = adapter(second), adapter(flower_runs["rolora"])
    assert one.keys() == two.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name], err_msg=name)
        np.testing.assert_array_equal(array, adapter(first.path)[name], err_msg=name)


@pytest.mark.parametrize("strategy", ON_RAY)
def test_a_run_spends_its_budget_and_no_more(flower_runs: dict[str, Path], strategy: str) -> None:
    summary = json.loads((flower_runs[strategy] / "summary.json").read_text())
    assert 0.98 * 8 < summary["epsilon_max"] <= 8
    assert summary["failures"] == 0
    # Under Flower's own command nobody tells the server how much noise clients add.
    assert summary["robust"] == "none"
    rows = [json.loads(line) for line in (flower_runs[strategy] / "clients.jsonl").open()]
    assert len(rows) == 8
    assert {row["client"] for row in rows} == {f"partition-{i:06d}" for i in range(4)}
    assert all(row["epsilon"] <= 8 for row in rows)


def test_half_uploads_weigh_half(flower_runs: dict[str, Path]) -> None:
    summaries = {
        name: json.loads((path / "summary.json").read_text()) for name, path in flower_runs.items()
    }
    assert summaries["dp-lora"]["bytes_up"] == summaries["dp-lora"]["bytes_down"]
    # RoLoRA's rounds B and A together send each adapter array once, and the head twice.
    sizes = {name: array.nbytes + 128 for name, array in adapter(flower_runs["rolora"]).items()}
    head = sum(size for name, size in sizes.items() if "lora" not in name)
    adapters = sum(size for name, size in sizes.items() if "lora" in name)
    assert summaries["rolora"]["bytes_up"] == 4 * (adapters + 2 * head)


def test_a_run_that_fails_says_why_although_flower_exits_with_zero(tmp_path: Path) -> None:
    plan = prepare_run(replace(config("rolora"), round_timeout=0.01))
    run_dir = RunDirectory(tmp_path / "late")
    with pytest.raises(RunFailed, match="no reply in time"):
        run_on_flower(plan, run_dir, ignore, workers=1)
    summary = run_dir.summary()
    assert summary is not None
    assert summary["status"] == "failed"
    assert "min-completion" in summary["error"]


def test_flowers_own_command_is_as_the_readme_shows_it(tmp_path: Path) -> None:
    """In a shell without the environment: no run-dir, and fewer nodes than num-clients."""
    script = "\n".join(FLOWER)
    for shown, here in {
        "$PWD/.venv/bin": str(BIN),
        "strategy='dp-lora'": "strategy='ffa-lora' federation.num-rounds=1 training.local-steps=1",
        "num-supernodes=10": "num-supernodes=2",
    }.items():
        assert shown in script
        script = script.replace(shown, here)
    own = {"FLWR_HOME": str(tmp_path / "flwr"), MARK: str(tmp_path)}  # Nobody else's SuperLink.
    for name in ("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "FLWR_LOCAL_CONTROL_API_PORT"):
        own[name] = str(free_port())
    try:
        done = subprocess.run(
            ["sh", "-ec", script],
            env=unactivated(**own), cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
    finally:
        left_of(str(tmp_path), patience=0.0)
    assert done.returncode == 0, done.stdout + done.stderr
    latest = Path(os.environ["XDG_DATA_HOME"]) / "fedlora" / "runs" / "latest"
    summary = json.loads((latest / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert (summary["strategy"], summary["num_clients"]) == ("ffa-lora", 2)
    assert summary["reproducible_noise"] is False


def test_bad_input_ends_before_any_work_with_one_line_and_exit_code_1(tmp_path: Path) -> None:
    command = [FEDLORA, "run", "digits", "-c", "strategy=rolra", "--output", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: strategy = 'rolra' cannot be used")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_the_main_recipe_meets_its_promise(tmp_path: Path) -> None:
    """The digits recipe from the command line, as a user types it."""
    command = [FEDLORA, "simulate", "digits", "--json", "--output", str(tmp_path)]
    done = subprocess.run(command, env=unactivated(), capture_output=True, text=True, check=True)
    summary = json.loads(done.stdout)
    assert summary["final_accuracy"] >= 0.80
    assert summary["final_accuracy"] > summary["initial_accuracy"] + 0.1
    assert summary["epsilon_max"] <= summary["epsilon_budget"] == 8
    assert summary["accountant"] == "prv"
    assert (tmp_path / "latest" / "summary.json").exists()


def test_a_failure_shows_its_cause_and_the_log(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the ledger's folder should be")
    command = [
        FEDLORA,
        "simulate",
        "-c",
        f"state-dir={blocked}",
        "--output",
        str(tmp_path / "runs"),
    ]
    command += ["-c", "num-rounds=1", "-c", "num-clients=2", "-c", "delta=0.0005"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{blocked} cannot be used: a file is in the way" in done.stderr
    assert "run.log" in done.stderr
