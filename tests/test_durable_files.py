"""Files and folders are there whole or not at all; trouble with them is one sentence."""

from __future__ import annotations

import json
import logging
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlora_flwr import files
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import FedLoRAError, InvalidValue
from fedlora_flwr.files import (
    FileTrouble,
    append,
    locked,
    read_or_make,
    replace_file,
    replacing,
)
from fedlora_flwr.lora.adapters import AdaptedModel, attach
from fedlora_flwr.processes.workers import log_to_file
from fedlora_flwr.server.run_dir import RunDirectory
from tests.models import ROBERTA


def write_adapters(adapted: AdaptedModel, folder: Path) -> None:
    """Export a real adapter again and again, its arrays all of one value, until killed."""
    for value in range(1_000_000):
        adapted.write({name: np.full_like(a, value) for name, a in adapted.read().items()})
        with replacing(folder / "adapter") as draft:
            adapted.export(draft)
        append(folder / "rounds.jsonl", b'{"text": "%s"}\n' % (b"x" * 20_000))


def test_an_adapter_is_whole_at_every_moment_that_its_writer_is_killed(tmp_path: Path) -> None:
    draw, adapter = random.Random(0), tmp_path / "adapter"
    adapted = attach(ROBERTA.model().float(), ROBERTA.spec(), 0)
    for _ in range(25):
        before = adapter.stat().st_ino if adapter.exists() else 0
        # Forked, so that it need not build the model.
        writer = get_context("fork").Process(target=write_adapters, args=(adapted, tmp_path))
        writer.start()
        while not adapter.exists() or adapter.stat().st_ino == before:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.1)
        writer.kill()
        writer.join()
        arrays = load_file(adapter / "adapter_model.safetensors")
        assert json.loads((adapter / "adapter_config.json").read_text())["r"]
        (value,) = {float(array.flatten()[0]) for array in arrays.values()}
        assert all((array == value).all() for array in arrays.values())
    assert all(len(row["text"]) == 20_000 for row in RunDirectory(tmp_path).rows("rounds"))


@pytest.mark.parametrize("left", ["", "half a line", "x" * 200_000])
def test_what_a_killed_writer_left_of_a_line_is_removed(tmp_path: Path, left: str) -> None:
    file = tmp_path / "rows.jsonl"
    for whole in ("", "one\n", "one\ntwo\n"):
        file.write_text(whole + left)
        append(file, b"next\n")
        append(file, b"last\n")
        assert file.read_text() == f"{whole}next\nlast\n"


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_takes_the_place_of_another(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:  # As on a system without that call.
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    for value in ("one", "two"):
        with replacing(tmp_path / "folder") as draft:
            (draft / "inner").mkdir(parents=True)
            (draft / "inner" / value).write_text(value)
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "folder") as draft:
        draft.mkdir(mode=1 // 0)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert [p.name for p in (tmp_path / "folder" / "inner").iterdir()] == ["two"]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux can exchange two names")
def test_a_reader_never_misses_a_folder_that_is_replaced(tmp_path: Path) -> None:
    folder, missed, stop = tmp_path / "folder", [], threading.Event()

    def write() -> None:
        with replacing(folder) as draft:
            draft.mkdir()
            (draft / "file").write_text("whole")

    def read() -> None:
        while not stop.is_set():
            try:
                folder.stat()
            except FileNotFoundError:
                missed.append(1)

    write()
    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(50):
        write()
    stop.set()
    reader.join()
    assert not missed


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file can grow beyond 100,000 bytes, as on a disk that is full there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_file_and_names_the_path(
    full_disk: None, tmp_path: Path
) -> None:
    path, rows = tmp_path / "file", tmp_path / "rows.jsonl"
    replace_file(path, b"old")
    append(rows, b"x" * 60_000 + b"\n")
    with pytest.raises(FileTrouble, match=r"^/.*/file cannot be used: File too large\. Make room"):
        replace_file(path, b"x" * 200_000)
    with pytest.raises(FileTrouble, match=r"/rows\.jsonl cannot be used: File too large"):
        append(rows, b"y" * 60_000 + b"\n")
    # A library with an error type of its own.
    adapter = tmp_path / "adapter"
    with pytest.raises(FileTrouble, match="/adapter cannot be used: File"), replacing(adapter) as a:
        save_file({"a": torch.zeros(100_000)}, a)
    assert path.read_bytes() == b"old"
    assert rows.read_bytes() == b"x" * 60_000 + b"\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "rows.jsonl"]


def test_a_file_in_the_way_and_a_folder_that_nobody_can_write_to(tmp_path: Path) -> None:
    (tmp_path / "blocked").touch()
    with pytest.raises(FileTrouble, match=r"/blocked/file cannot be used: a file is in the way"):
        replace_file(tmp_path / "blocked" / "file", b"")
    with pytest.raises(FileTrouble, match="/proc/fedlora cannot be used: No such file"):
        replace_file(Path("/proc/fedlora"), b"")
    error = FileTrouble.of(PermissionError(13, "Permission denied", "/there"))
    assert str(error) == (
        "/there cannot be used: Permission denied. Choose a folder that can be written to."
    )
    # Who catches either kind catches it.
    assert isinstance(error, FedLoRAError)
    assert isinstance(error, OSError)
    assert error.errno == 13


def test_who_waits_for_a_lock_says_for_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "_PATIENCE", 0.0)
    # Another process holds it, as one thread cannot wait for itself.
    holder = (
        "import sys, time; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]): print('held', flush=True); time.sleep(1)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, f"{tmp_path}/cache.lock"], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with locked(tmp_path / "cache"):
            assert "holds " + str(tmp_path / "cache.lock") in caplog.text
    with pytest.raises(FileTrouble, match="/proc/cache"), locked(Path("/proc/cache")):
        pass


def test_a_log_that_cannot_grow_loses_lines_in_silence(
    full_disk: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("flwr")
    before = logger.handlers[:], logger.propagate
    log_to_file(tmp_path / "run.log")
    logger.error("x" * 200_000)
    logger.handlers[:], logger.propagate = before
    assert capfd.readouterr().err == ""


def test_an_error_about_another_file_keeps_its_name(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with pytest.raises(FileTrouble, match="/missing cannot be used: No such"), replacing(file):
        (tmp_path / "missing").read_bytes()
    with pytest.raises(InvalidValue), replacing(tmp_path / "file"):
        raise InvalidValue("key", 1, "2 (os error 28)")
    assert not list(tmp_path.iterdir())


def test_of_many_runs_one_gets_a_folder(tmp_path: Path) -> None:
    ready, taken, refused = threading.Barrier(8), [], []

    def take() -> None:
        run = RunDirectory(tmp_path / "run")
        ready.wait()
        try:
            run.take()
            taken.append(run)
        except InvalidValue:
            refused.append(run)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    assert len(refused) == 7
    taken[0].take()  # What is taken stays.
    RunDirectory(tmp_path / "run", taken[0].claim).take()  # Another process of the same run.


@pytest.mark.parametrize("name", ["config.toml", "rounds.jsonl", "summary.json", "run.log"])
def test_a_folder_with_a_runs_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InvalidValue, match="a folder that no other run has written to"):
        RunDirectory(tmp_path).take()


def test_a_written_recipe_names_no_folder_of_its_run(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    own = str(run.path.resolve())
    recipe = run.write_config(RunConfig.of({"run-dir": own, "state-dir": own})).read_text()
    assert own not in recipe
    shared = RunConfig.of({"run-dir": own, "state-dir": str(tmp_path)})
    assert f'state-dir = "{tmp_path}"' in run.write_config(shared).read_text()


def test_what_a_killed_process_left_of_a_cache_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    (tmp_path / ".weights.0123").write_text("half")
    (tmp_path / ".weights.4567").mkdir()
    read = partial(_text, path)
    assert read_or_make(path, read, lambda draft: replace_file(draft, b"whole")) == "whole"
    assert {entry.name for entry in tmp_path.iterdir()} <= {"weights", "weights.lock"}


def test_a_cache_that_cannot_be_read_back_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with pytest.raises(FileTrouble, match=r"/weights was written and cannot be read back\. Choose"):
        read_or_make(path, lambda: None, lambda draft: draft.touch())


def _text(path: Path) -> str | None:
    return path.read_text() if path.exists() else None
