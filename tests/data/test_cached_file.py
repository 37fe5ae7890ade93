from __future__ import annotations

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedlora_flwr.data.cached_file import read_or_build
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.files import cache_folder


class Builder:
    """Counts how often it is asked, and gives other bytes each time."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> bytes:
        self.calls += 1
        return b"weights %d" % self.calls


def test_the_file_is_built_once(tmp_path: Path) -> None:
    build = Builder()
    path = tmp_path / "new" / "weights"

    assert [read_or_build(path, build) for _ in range(3)] == [b"weights 1"] * 3
    assert path.read_bytes() == b"weights 1"
    assert {entry.name for entry in path.parent.iterdir()} <= {
        "weights",
        "weights.sha256",
        "weights.lock",
    }


@pytest.mark.parametrize("damage", [b"", b"weights", b"weights 1 and more"])
def test_a_damaged_file_is_built_again_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    build, path = Builder(), tmp_path / "weights"
    read_or_build(path, build)
    path.write_bytes(damage)

    with caplog.at_level(logging.WARNING):
        assert read_or_build(path, build) == b"weights 2"

    assert path.read_bytes() == b"weights 2"
    assert [record.getMessage().count("\n") for record in caplog.records] == [0]


def test_a_file_without_its_checksum_is_not_trusted(tmp_path: Path) -> None:
    build, path = Builder(), tmp_path / "weights"
    read_or_build(path, build)
    (tmp_path / "weights.sha256").unlink()

    assert read_or_build(path, build) == b"weights 2"


def test_a_failed_build_leaves_no_file_and_the_next_one_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "weights"

    def fail() -> bytes:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        read_or_build(path, fail)

    assert not path.exists()
    assert read_or_build(path, Builder()) == b"weights 1"


def test_threads_that_miss_at_once_get_one_build(tmp_path: Path) -> None:
    build, path = Builder(), tmp_path / "weights"

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: read_or_build(path, build), range(8)))

    assert (found, build.calls) == ({b"weights 1"}, 1)


def test_processes_that_miss_at_once_get_one_build(tmp_path: Path) -> None:
    program = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from fedlora_flwr.data.cached_file import read_or_build\n"
        "def build():\n"
        "    time.sleep(0.3)\n"
        "    return str(os.getpid()).encode()\n"
        "print(read_or_build(Path(sys.argv[1]), build).decode())\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "weights")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    answers = {process.communicate(timeout=60)[0].strip() for process in processes}

    assert len(answers) == 1
    assert answers <= {str(process.pid) for process in processes}


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(InvalidValue, match="XDG_CACHE_HOME"):
        read_or_build(tmp_path / "file" / "weights", Builder())


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/fedlora")

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path.home() / ".cache" / "fedlora"
