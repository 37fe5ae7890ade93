"""A comparison is watched from its folder while it runs, when it has ended, and after a kill."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from filelock import FileLock
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.cli.watch_comparison_screen import WatchedComparison
from fedlora_flwr.cli.watch_page import serving
from fedlora_flwr.config import RunConfig
from fedlora_flwr.studies.compare import run_comparison
from fedlora_flwr.studies.compare_methods import read_methods
from fedlora_flwr.studies.compare_results import Row, describe_row, read_rows
from fedlora_flwr.studies.comparison import Comparison
from fedlora_flwr.studies.progress import FollowedComparison, PairState
from tests.studies.support import SHARED

ROWS, EPSILON, SEEDS, TRIALS = ("ffa-lora", "la-lora"), 8.0, 2, 2
RUNS = len(ROWS) * (SEEDS + TRIALS)


@dataclass
class Look:
    """What a watcher sees just after a run has ended."""

    ended: str
    new: list[Row]
    total: int
    running: int
    pairs: list[PairState]
    seconds_left: float | None
    ending: str | None
    lines: list[str]


@dataclass
class Story:
    folder: Path
    looks: list[Look]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder, looks = tmp_path_factory.mktemp("watched") / "made", []
    what = Comparison(SHARED, read_methods(ROWS, RunConfig()), (EPSILON,), SEEDS, TRIALS)
    followed = FollowedComparison(folder)

    def look(row: Row | None, *_: int) -> None:
        new, watched = followed.new_rows(), WatchedComparison(folder)
        list(watched.news())
        looks.append(
            Look(
                describe_row(row) if row else "", new, followed.total, len(followed.running),
                followed.pairs(), followed.seconds_left, followed.ending(), watched.lines(None),
            )
        )  # fmt: skip

    run_comparison(what, folder, look)
    return Story(folder, looks)


def test_each_run_is_done_at_work_or_left_at_every_moment(story: Story) -> None:
    told = [look for look in story.looks if look.ended]
    assert len(told) == RUNS
    for number, look in enumerate(told, start=1):
        assert [describe_row(row) for row in look.new] == [look.ended]
        assert [pair.row for pair in look.pairs] == [*ROWS]
        done, running, left = (
            sum(getattr(pair, name) for pair in look.pairs) for name in ("done", "running", "left")
        )
        assert (done, done + running + left, look.total) == (number, RUNS, RUNS)
        phase_over = number in (len(ROWS) * TRIALS, RUNS)
        assert (running, look.running) == (int(not phase_over),) * 2
        assert look.ending is None


def test_the_mean_is_of_reported_runs_alone_and_the_time_left_of_all(story: Story) -> None:
    rows = read_rows(story.folder / "rows.csv")
    assert all(pair.mean is None for look in story.looks[:4] for pair in look.pairs)
    for pair in story.looks[-1].pairs:
        reported = rows[(rows["phase"] == "report") & (rows["row"] == pair.row)]["final"]
        assert pair.mean == pytest.approx(statistics.fmean(reported))
    third = story.looks[3]
    assert third.seconds_left == pytest.approx(rows["seconds"][:3].mean() * (RUNS - 3))
    assert story.looks[-1].seconds_left == 0


def test_a_terminal_shows_a_row_each(story: Story) -> None:
    state, _, heads, *rows = story.looks[3].lines
    assert state.startswith(f"3 of {RUNS} runs are done, 1 is running, about ")
    assert heads.split() == ["row", "ε", "done", "failed", "running", "left", "mean"]
    assert [row.split() for row in rows] == [
        ["ffa-lora", "8", "2", "0", "0", "2", "–"],
        ["la-lora", "8", "1", "0", "1", "2", "–"],
    ]


def watched(folder: Path) -> list[str]:
    result = CliRunner().invoke(app, ["watch", str(folder)])
    assert result.exit_code == 0, result.output
    return [line for line in result.output.splitlines() if line]


def spoilt(story: Story, folder: Path) -> Path:
    """Return the folder as a kill leaves it, an hour later."""
    copy = Path(shutil.copytree(story.folder, folder))
    (copy / "table.md").unlink()
    lines = (copy / "rows.csv").read_text().splitlines(keepends=True)
    (copy / "rows.csv").write_text("".join(lines[:-2]) + "report,ffa-lora,8.0")
    then = time.time() - 3600
    for file in copy.iterdir():
        os.utime(file, (then, then))
    return copy


def test_a_finished_comparison_is_told_run_by_run(story: Story) -> None:
    lines = watched(story.folder)
    assert len(lines) == RUNS + 1 + 1 + len(ROWS) + 1
    assert lines[0].startswith(f"run 1/{RUNS}: tune ffa-lora ε 8, ")
    assert lines[RUNS] == f"{RUNS} of {RUNS} runs are done"
    table = story.folder / "table.md"
    assert lines[-1].split(maxsplit=1) == ["Ended", f"completed; the results are in {table}"]


def test_a_killed_comparison_is_not_waited_for(story: Story, tmp_path: Path) -> None:
    folder = spoilt(story, tmp_path / "killed")
    with FileLock(folder / ".lock"):
        then = time.time() - 3600
        os.utime(folder / ".lock", (then, then))
        assert FollowedComparison(folder).ending() is None
    lines = watched(folder)
    assert lines[RUNS - 2].startswith(f"{RUNS - 2} of {RUNS} runs are done")
    assert lines[-1].split(maxsplit=1) == [
        "Ended", "before its last run; the same command continues it"
    ]  # fmt: skip


def test_a_comparison_that_has_just_written_is_waited_for(story: Story, tmp_path: Path) -> None:
    folder = spoilt(story, tmp_path / "begun")
    (folder / "rows.csv").touch()
    assert FollowedComparison(folder).ending() is None


def test_a_run_that_failed_is_counted_until_it_is_tried_again(story: Story, tmp_path: Path) -> None:
    folder = spoilt(story, tmp_path / "failed")
    rows = read_rows(folder / "rows.csv")
    rows.loc[rows.index[-1], "error"] = "ValueError: no"
    rows.to_csv(folder / "rows.csv", index=False)
    followed = FollowedComparison(folder)
    followed.new_rows()
    assert [(pair.done, pair.failed) for pair in followed.pairs()] == [(3, 0), (2, 1)]


def test_its_page_reloads_until_it_has_ended(story: Story, tmp_path: Path) -> None:
    folder = spoilt(story, tmp_path / "page")
    (folder / "rows.csv").touch()
    with serving(WatchedComparison(folder).page) as address:
        first = httpx.get(address).text
        assert 'http-equiv="refresh"' in first
        assert "ffa-lora" in first
        (folder / "table.md").write_text("The end.")
        assert 'http-equiv="refresh"' not in httpx.get(address).text
