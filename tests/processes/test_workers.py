"""The engine without Ray on several processes: same arrays, state that follows, a killed one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, RecordDict
from safetensors.numpy import load_file

from fedlora_flwr.backbones.pretrain_digits import backbone_path, load_backbone
from fedlora_flwr.files import cache_folder
from fedlora_flwr.processes.workers import Execute, WorkerDied, executor
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations import runner
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.simulations.runner import prepare_run, run_in_process
from tests.conftest import MakeConfig
from tests.processes.counting import count, send_half
from tests.processes.uploading import upload


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Execute]:
    """Start workers once, since each imports for seconds: what one run leaves reaches the next."""
    with pytest.MonkeyPatch.context() as patch:
        load_backbone()  # Pretraining it again would take longer than all else here.
        cache, pretrained = tmp_path_factory.mktemp("cache"), backbone_path().parent
        patch.setenv("XDG_CACHE_HOME", str(cache))
        shutil.copytree(pretrained, backbone_path().parent)
        with executor(2, cache / "workers.log") as execute:
            yield execute


@pytest.mark.parametrize("strategy", ["fedsa-lora", "flora"])
def test_workers_give_the_arrays_and_rows_of_one_process(
    strategy: str,
    make_config: MakeConfig,
    pool: Execute,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "executor", lambda *_: nullcontext(pool))
    found = {}
    for workers in (1, 2):
        folder = tmp_path / f"workers-{workers}"
        config = make_config(strategy=strategy, lora_dropout=0.1, state_dir=str(folder))
        run_dir = RunDirectory(folder)
        summary = run_in_process(prepare_run(config), run_dir, lambda _: None, workers)
        arrays = load_file(run_dir.adapter / "adapter_model.safetensors")
        rows = [
            {key: value for key, value in row.items() if "seconds" not in key}
            for row in run_dir.rows("rounds")
        ]
        found[workers] = (
            {name: array.tobytes() for name, array in arrays.items()},
            rows,
            {key: summary[key] for key in ("epsilon_max", "bytes_up", "failures")},
        )
    assert found[1] == found[2]
    # Only workers have weights to share.
    assert len(list((cache_folder() / "frozen").glob("*.pt"))) == 1


@pytest.mark.parametrize("changes", [{}, {"secure_noise": True}, {"reproducible": True}])
def test_each_process_draws_its_own_noise_for_the_same_client_and_round(
    changes: dict[str, bool], make_config: MakeConfig, pool: Execute, tmp_path: Path
) -> None:
    """Each begins with the configuration alone, as a process that is started again does."""
    config, meeting = make_config(**{"reproducible": False, **changes}), tmp_path / "meeting"
    meeting.mkdir()
    made = [*pool(upload, [(config, meeting)] * 2), upload((config, meeting))]
    assert len({process for process, _ in made}) == 3
    assert len({arrays for _, arrays in made}) == (1 if config.reproducible else 3)


@pytest.fixture
def grid(tmp_path: Path) -> Iterator[LocalGrid]:
    with executor(2, tmp_path / "workers.log") as execute:
        grid = LocalGrid(count, 4, {"rank": 8}, execute)
        with grid.running():
            yield grid


def ask(grid: LocalGrid, nodes: list[int], die: bool = False) -> list[dict[str, object]]:
    config = ConfigRecord({"die": die})
    messages = [
        grid.create_message(RecordDict({"config": config}), "train", node, "group")
        for node in nodes
    ]
    replies = list(grid.send_and_receive(messages))
    assert [reply.metadata.src_node_id for reply in replies] == nodes
    return [dict(reply.content.config_records["config"]) for reply in replies]


def test_a_nodes_messages_are_served_in_order_and_its_state_follows_it(grid: LocalGrid) -> None:
    nodes = [*grid.get_node_ids()]
    first = ask(grid, nodes * 3)
    assert [answer["count"] for answer in first] == [1] * 4 + [2] * 4 + [3] * 4
    assert os.getpid() not in {answer["process"] for answer in first}
    assert [answer["count"] for answer in ask(grid, nodes)] == [4] * 4


def test_a_killed_worker_is_an_error_at_once(tmp_path: Path) -> None:
    def work() -> None:
        with executor(2, tmp_path / "workers.log") as execute:
            grid = LocalGrid(count, 4, {}, execute)
            with grid.running():
                ask(grid, [*grid.get_node_ids()], die=True)

    with pytest.raises(WorkerDied, match=r"killed; see .*workers\.log"):
        work()


def test_a_worker_killed_while_it_sends_is_an_error_too(tmp_path: Path) -> None:
    """The other worker waits for its turn to send, which would never come."""
    with (
        pytest.raises(WorkerDied, match=r"killed; see .*workers\.log"),
        executor(2, tmp_path / "workers.log") as execute,
    ):
        list(execute(send_half, range(4)))
