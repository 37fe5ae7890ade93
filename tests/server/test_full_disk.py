"""A disk that is really full at any write of a run costs nothing that was there before."""

from __future__ import annotations

import ctypes
import os
import random
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import FedLoRAError
from fedlora_flwr.processes.workers import THREADS
from tests.server.resuming import Deadly, assert_same, begin, has_begun, ledger, resume, rows, tiny

_NEW_USER, _NEW_MOUNTS = 0x10000000, 0x00020000
SIZE = "4m"


class Filling(Deadly):
    """Fills the disk before one write; the writes themselves are the real ones."""

    def __init__(self, at: int, disk: Path) -> None:
        super().__init__(at)
        self._disk = disk

    def _pass(self) -> None:
        self.seen += 1
        if self.seen == self._at:
            fill(self._disk)


def fill(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as stream:
        for size in (65536, 512):
            try:
                while stream.write(b"x" * size) == size:
                    pass
            except OSError:
                continue


def mount(disk: Path) -> bool:
    """Mount a small file system for this process alone; return False where that is forbidden."""
    user, group, libc = os.getuid(), os.getgid(), ctypes.CDLL(None)
    if libc.unshare(_NEW_USER | _NEW_MOUNTS):
        return False
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    place = os.fsencode(disk)
    return not libc.mount(b"tmpfs", place, b"tmpfs", 0, f"size={SIZE}".encode())


@contextmanager
def told(to: Connection) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        to.send(f"{type(error).__name__}: {error}")
    else:
        to.send("")


def fill_and_go_on(config: RunConfig, whole: Path, disk: Path, writes: int, to: Connection) -> None:
    if not mount(disk):
        to.send("forbidden")
        return
    with told(to):
        draw, run = random.Random(0), disk / "run"
        said: list[str] = []
        while len(said) < 4:
            shutil.rmtree(run, ignore_errors=True)
            try:
                begin(config, run, Filling(draw.randrange(1, writes), disk))
            except FedLoRAError as error:
                said.append(str(error))
            (disk / "ballast").unlink(missing_ok=True)
            assert [path.name for path in run.glob(".*")] == [".claim"]
            if has_begun(run):
                paid = {row[:2] for row in ledger(run)}
                assert paid >= {(row["client"], row["round"]) for row in rows(run, "clients")}
                resume(config, run)
                assert_same(whole, run)
        for text in said:
            assert re.search(rf"{run}.*(No space left|is full).*[Mm]ake room there", text), text


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has file systems of one process")
def test_a_disk_that_is_full_at_any_write_ends_the_run_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in THREADS:  # Only a process with one thread can have a file system of its own.
        monkeypatch.setenv(name, "1")
    config = tiny(tmp_path, strategy="fedsa-lora", num_rounds=2, num_clients=2)
    whole, disk, counted = tmp_path / "whole", tmp_path / "disk", Deadly()
    disk.mkdir()
    begin(config, whole, counted)
    fresh = get_context("spawn")
    ours, theirs = fresh.Pipe()
    work = fresh.Process(target=fill_and_go_on, args=(config, whole, disk, counted.seen, theirs))
    work.start()
    theirs.close()
    problem = ours.recv()
    work.join()
    if problem == "forbidden":
        pytest.skip("This system lets no user mount a file system.")
    assert not problem
