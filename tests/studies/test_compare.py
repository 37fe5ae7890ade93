"""Real comparisons: one of four reported runs, and what becomes of its folder afterwards."""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from filelock import FileLock

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.recipes import load_recipe
from fedlora_flwr.errors import FedLoRAError, InvalidValue
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import prepare_run, run_in_process
from fedlora_flwr.studies.compare import run_comparison
from fedlora_flwr.studies.compare_methods import RATES, read_methods
from fedlora_flwr.studies.compare_results import COLUMNS, KEY, read_rows, summarize
from fedlora_flwr.studies.compare_tables import document_of, markdown
from fedlora_flwr.studies.comparison import RANGES, TUNING_SEED, Comparison
from fedlora_flwr.studies.paired import Findings
from tests.studies.support import SHARED

STRATEGIES = ("ffa-lora", "la-lora")
EPSILONS = (8.0, math.inf)
# What a call tells of each run; None when the runs begin.
Told = list[tuple[str | None, int, int]]


def comparison(**changes: Any) -> Comparison:
    methods = read_methods(changes.pop("strategies", STRATEGIES), RunConfig())
    return replace(Comparison(SHARED, methods, EPSILONS, seeds=2, trials=2), **changes)


def run(what: Comparison, folder: Path, workers: int = 1) -> tuple[pd.DataFrame, Told]:
    told: Told = []
    summary, _ = run_comparison(
        what, folder, lambda row, *count: told.append((row and row["phase"], *count)), workers
    )
    return summary, told


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame, Told]:
    folder = tmp_path_factory.mktemp("compare") / "made"
    return folder, *run(comparison(), folder)


@pytest.fixture
def finished(original: tuple[Path, pd.DataFrame, Told], tmp_path: Path) -> Path:
    """Return a copy of the finished folder, to be spoilt."""
    return Path(shutil.copytree(original[0], tmp_path / "copy"))


def keys(rows: pd.DataFrame) -> list[tuple[Any, ...]]:
    return list(rows[list(KEY)].itertuples(index=False, name=None))


def test_every_run_has_a_row(original: tuple[Path, pd.DataFrame, Told]) -> None:
    rows = read_rows(original[0] / "rows.csv")
    assert tuple(rows.columns) == COLUMNS
    assert len(set(keys(rows))) == len(rows) == 2 * 2 * 2 + 2 * 2 * 2
    assert (rows["error"] == "").all()
    tuned, reported = (rows[rows["phase"] == phase] for phase in ("tune", "report"))
    assert set(tuned["seed"]) == {TUNING_SEED}
    assert set(reported["seed"]) == {1, 2}
    assert set(zip(reported["strategy"], reported["epsilon"], strict=True)) == {
        (strategy, epsilon) for strategy in STRATEGIES for epsilon in EPSILONS
    }
    private = rows[rows["epsilon"] == 8]
    assert ((private["epsilon_max"] > 7.8) & (private["epsilon_max"] <= 8)).all()
    assert (rows["seconds"] > 0).all()
    assert (rows["failures"] == 0).all()


def test_progress_counts_every_run(original: tuple[Path, pd.DataFrame, Told]) -> None:
    told = original[2]
    assert [entry for entry in told if entry[0] is None] == [(None, 0, 16), (None, 8, 16)]
    done = [entry for entry in told if entry[0] is not None]
    assert done == [("tune" if n <= 8 else "report", n, 16) for n in range(1, 17)]


def test_a_row_is_what_that_run_alone_gives(
    original: tuple[Path, pd.DataFrame, Told], tmp_path: Path
) -> None:
    rows = read_rows(original[0] / "rows.csv")
    row = rows[(rows["phase"] == "report") & (rows["epsilon"] == 8)].iloc[-1]
    config = RunConfig.of(
        SHARED.items(),
        {name: float(row[name]) for name in (*RATES, "epsilon")},
        {"strategy": row["strategy"], "seed": int(row["seed"])},
    )
    summary = run_in_process(prepare_run(config), RunDirectory(tmp_path / "run"), lambda _: None)
    assert row["initial"] == summary["initial_accuracy"]
    assert row["final"] == summary["final_accuracy"] != row["initial"]
    assert row["epsilon_max"] == summary["epsilon_max"]
    assert (row["bytes_up"], row["bytes_down"]) == (summary["bytes_up"], summary["bytes_down"])


def test_the_best_trial_is_reported(original: tuple[Path, pd.DataFrame, Told]) -> None:
    rows = read_rows(original[0] / "rows.csv")
    for _, pair in rows.groupby(["row", "epsilon"]):
        tuned, reported = (pair[pair["phase"] == phase] for phase in ("tune", "report"))
        best = tuned.sort_values("final", ascending=False, kind="stable").iloc[0]
        assert len(tuned) == 2
        assert (reported[list(RATES)] == best[list(RATES)]).all(axis=None)


def test_the_table_follows_from_the_rows(original: tuple[Path, pd.DataFrame, Told]) -> None:
    folder = original[0]
    rows = read_rows(folder / "rows.csv").to_dict("records")
    lines = (folder / "table.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    assert cells[0] == ["method", "ε = 8", "no privacy", "kB up", "kB down"]
    means: dict[tuple[str, float], float] = {}
    for line in cells[2:4]:
        of_method = [r for r in rows if r["strategy"] == line[0] and r["phase"] == "report"]
        for epsilon, cell in zip(EPSILONS, line[1:3], strict=True):
            finals = [100 * r["final"] for r in of_method if r["epsilon"] == epsilon]
            mean, std = statistics.mean(finals), statistics.stdev(finals)
            assert cell.strip("*") == f"{mean:.1f} ± {std:.1f}"
            means[line[0], epsilon] = mean
        for name, cell in zip(("bytes_up", "bytes_down"), line[3:], strict=True):
            assert cell == f"{statistics.mean(r[name] for r in of_method) / 1000:,.1f}"
    for line in cells[2:4]:
        for epsilon, cell in zip(EPSILONS, line[1:3], strict=True):
            best = max(means[name, epsilon] for name in STRATEGIES)
            assert cell.startswith("**") == (means[line[0], epsilon] == best)


def test_the_files(original: tuple[Path, pd.DataFrame, Told]) -> None:
    folder, summary, _ = original
    expected = {"accuracy.png", "compare.log", "progress.json", "rows.csv", "settings.json"}
    expected |= {"table.md", "table.tex"}
    assert {path.name for path in folder.iterdir() if path.name != ".lock"} == expected
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["epsilons"] == ["8.0", "inf"]
    assert (settings["num-rounds"], settings["seeds"], settings["trials"]) == (1, 2, 2)
    assert "Starting" in (folder / "compare.log").read_text()
    assert list(summary["failed"]) == [0] * 4


def test_the_title_names_a_simulated_sum(original: tuple[Path, pd.DataFrame, Told]) -> None:
    by_sum = load_recipe("digits-secure-sum", ["num-rounds=3"])
    titles = [
        document_of(original[1], config, "accuracy", 2, Findings("ffa-lora"))[0]
        for config in (by_sum, SHARED)
    ]
    assert titles == [
        "# digits, secure sum simulated: accuracy in % after round 3",
        "# digits: accuracy in % after round 1",
    ]


def test_a_second_call_runs_nothing(finished: Path) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    _, told = run(comparison(), finished)
    assert told == [(None, 8, 16), (None, 16, 16)]
    for name in ("rows.csv", "table.md", "settings.json", "accuracy.png"):
        assert (finished / name).read_bytes() == before[name], name


def test_what_is_missing_runs_in_worker_processes_and_gives_the_same(finished: Path) -> None:
    """Loses a whole row, half a row, and the table."""
    table = (finished / "table.md").read_bytes()
    complete = read_rows(finished / "rows.csv")
    lines = (finished / "rows.csv").read_text().splitlines(keepends=True)
    (finished / "rows.csv").write_text("".join(lines[:-2]) + lines[-2][:25])
    (finished / "table.md").unlink()
    _, told = run(comparison(), finished, workers=2)
    assert [entry[1] for entry in told] == [8, 14, 15, 16]
    rows = read_rows(finished / "rows.csv")
    given = [*KEY, "initial", "final", "epsilon_max", "bytes_up", "bytes_down"]
    expected, found = (
        frame.sort_values(list(KEY))[given].reset_index(drop=True) for frame in (complete, rows)
    )
    pd.testing.assert_frame_equal(expected, found)
    assert (finished / "table.md").read_bytes() == table


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"trials": 3}, r"trials = 2 \(now 3\)"),
        ({"seeds": 1}, "seeds"),
        ({"epsilons": (8.0,)}, "epsilons"),
        ({"strategies": ("la-lora", "rolora")}, "rows"),
        ({"config": replace(SHARED, clip_norm=2.0)}, r"clip-norm = 1.0 \(now 2.0\)"),
    ],
)
def test_other_settings_are_refused(finished: Path, changes: dict[str, Any], name: str) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    with pytest.raises(InvalidValue, match=name):
        run(comparison(**changes), finished)
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_a_folder_is_for_one_process_at_a_time(finished: Path) -> None:
    with FileLock(finished / ".lock"), pytest.raises(FedLoRAError, match="Another process"):
        run(comparison(), finished)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategies": ("roloro",)}, "did you mean 'rolora'"),
        ({"config": replace(SHARED, batch_size=1000)}, "batch-size"),
        ({"config": replace(SHARED, delta=0.01)}, "delta"),
        ({"config": replace(SHARED, min_records=10_000)}, "min"),
        ({"config": replace(SHARED, weighting="inverse-noise")}, "epsilon = inf"),
        ({"config": replace(SHARED, task="digit")}, "did you mean 'digits'"),
    ],
)
def test_what_cannot_run_is_refused_before_any_work(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidValue, match=message):
        run(comparison(**changes), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_failed_run_is_recorded_shown_and_tried_again(tmp_path: Path) -> None:
    what = comparison(
        # With noise of that size no upload fits.
        config=replace(SHARED, clip_norm=1e6, lr_head=100.0),
        epsilons=(math.inf, 8.0),
        seeds=1,
        trials=0,
    )
    summary, told = run(what, tmp_path / "failing")
    assert [entry[1] for entry in told] == [0, 0, 1, 2, 3, 4]
    rows = read_rows(tmp_path / "failing" / "rows.csv").set_index(["strategy", "epsilon"])
    for strategy in STRATEGIES:
        assert "fewer than min-completion" in str(rows.loc[(strategy, 8.0), "error"])
        assert rows.loc[(strategy, math.inf), "error"] == ""
    failed = summary.set_index(["row", "epsilon"])["failed"]
    assert {pair: failed[pair] for pair in failed.index} == {
        (strategy, epsilon): int(epsilon == 8) for strategy in STRATEGIES for epsilon in EPSILONS
    }
    table = (tmp_path / "failing" / "table.md").read_text()
    assert len(re.findall(r"\| failed ", table)) == 2
    assert "without tuning" in table
    _, told = run(what, tmp_path / "failing")
    assert [entry[1:] for entry in told] == [(0, 4), (2, 4), (3, 4), (4, 4)]
    assert len(read_rows(tmp_path / "failing" / "rows.csv")) == 4


def test_a_pair_whose_every_trial_failed_is_not_reported() -> None:
    what = comparison(strategies=("rolora",), epsilons=(1.0, 2.0), trials=2)
    rows: dict[tuple[Any, ...], Any] = {}
    for job, final in zip(what.tune_jobs(), (None, None, 0.5, 0.5), strict=True):
        error = "" if final else "ValueError: no"
        rows[job.key] = {"final": final, "error": error}
    chosen = what.choose(rows)
    assert chosen == {("rolora", 1.0): None, ("rolora", 2.0): what.candidates("rolora")[0]}
    assert {job.pair for job in what.report_jobs(chosen)} == {("rolora", 2.0)}
    summary, found = summarize([], chosen, 2), Findings("rolora")
    table = markdown(document_of(summary, what.config, "accuracy", 2, found))
    line = next(line for line in table.splitlines() if line.startswith("| rolora"))
    assert [cell.strip() for cell in line.split("|")[2:4]] == ["failed", "failed"]


def test_rates_to_try_start_with_the_configurations_own_and_cover_the_ranges_around_them() -> None:
    config = replace(SHARED, lr_a=0.001, lr_b=0.3, lr_head=5.0)

    def tried(trials: int) -> list[tuple[float, float, float]]:
        return comparison(config=config, trials=trials).candidates("la-lora")

    candidates = tried(60)
    assert candidates[0] == (0.001, 0.3, 5.0)
    assert len(set(candidates)) == 60
    assert tried(8) == candidates[:8]
    assert tried(1) == candidates[:1]
    columns = zip(*candidates[1:], strict=True)
    for own, rates, (low, high) in zip(candidates[0], columns, RANGES.values(), strict=True):
        multiples = [rate / own for rate in rates]
        assert all(low <= multiple <= high for multiple in multiples)
        # On a logarithmic scale, each third of the range holds about a third of the points.
        thirds = [int(3 * math.log(m / low) / math.log(high / low)) for m in multiples]
        assert all(abs(thirds.count(third) - 59 / 3) < 3 for third in range(3))


def test_every_pair_is_tuned_on_the_same_settings() -> None:
    what = comparison(trials=4)
    jobs = what.tune_jobs()
    for pair in what.pairs:
        assert [job.rates for job in jobs if job.pair == pair] == what.candidates("la-lora")
    assert not comparison(trials=0).tune_jobs()
