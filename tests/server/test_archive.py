"""A run that cannot be written to, such as one in a mounted archive, is read all the same."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora_flwr.config import RunConfig
from fedlora_flwr.server.run_dir import RunDirectory

READ = """
import sys
from pathlib import Path
from typer.testing import CliRunner
from fedlora_flwr.cli import app
from fedlora_flwr.server.run_result import RunResult, load_runs

run, out = Path(sys.argv[1]), Path(sys.argv[2])
try:
    (run / "new").touch()
except OSError:
    print("closed")
for command in (["watch", str(run)], ["report", str(run), "-o", str(out / "report.html")]):
    found = CliRunner().invoke(app, command)
    print(command[0], found.exit_code, found.output if found.exit_code else "")
result = RunResult.load(run)
result.plot(out / "run.png")
print(result.rounds["round"].tolist(), len(result.clients), len(load_runs(run.parent)))
print(CliRunner().invoke(app, ["report", str(run)]).output)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has file systems of one process")
def test_a_run_in_a_closed_archive_is_watched_reported_loaded_and_drawn(
    finished: tuple[RunConfig, RunDirectory], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    run = finished[1].path
    if not shutil.which("unshare"):
        pytest.skip("This system has no unshare.")
    mount = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" || exit 77; shift; exec "$@"'
    command = [sys.executable, "-c", READ, str(run), str(tmp_path)]
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", run, *command],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if done.returncode in (1, 77) and "closed" not in done.stdout:
        pytest.skip("This system lets no user mount a file system.")
    lines = done.stdout.splitlines()
    assert lines[:3] == ["closed", "watch 0 ", "report 0 "], done.stdout + done.stderr
    assert lines[3].startswith("[0, 1"), lines
    assert lines[3].endswith(" 1")
    assert "Choose a folder that can be written to" in " ".join(lines[4:])
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert (tmp_path / "run.png").exists()
