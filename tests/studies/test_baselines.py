"""Which baselines a comparison gets, and what a real one then says."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.recipes import load_recipe
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import prepare_run, run_in_process
from fedlora_flwr.studies.baseline_names import BASELINES, HEAD_ONLY, NO_NOISE, NO_PRIVACY
from fedlora_flwr.studies.baselines import MOST_ADDED, Chosen, with_baselines
from fedlora_flwr.studies.compare import run_comparison
from fedlora_flwr.studies.compare_methods import read_methods
from fedlora_flwr.studies.compare_results import Row, read_rows
from fedlora_flwr.studies.comparison import Comparison, Job
from fedlora_flwr.studies.paired import Findings, paired
from tests.studies.support import SHARED


def comparison(
    *rows: str, epsilons: tuple[float, ...] = (8.0,), seeds: int = 2, trials: int = 0, **other: Any
) -> Comparison:
    shared = RunConfig.of(SHARED.items(), {k.replace("_", "-"): v for k, v in other.items()})
    methods = read_methods(rows or ("ffa-lora",), shared)
    return Comparison(shared, methods, epsilons, seeds, trials)


def chosen(what: Comparison, text: str = "auto") -> Chosen:
    return with_baselines(what, text)[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison, Findings]:
    folder = tmp_path_factory.mktemp("baselines") / "made"
    what, _ = with_baselines(comparison(), "all")
    return folder, what, run_comparison(what, folder, lambda *_: None)[1]


def finals(folder: Path, row: str, epsilon: float, column: str = "final") -> dict[int, float]:
    rows = read_rows(folder / "rows.csv")
    mine = rows[(rows["row"] == row) & (rows["epsilon"] == epsilon)]
    return dict(zip(mine["seed"].tolist(), mine[column].tolist(), strict=True))


def test_each_row_stands_beside_the_head_no_privacy_no_training_and_no_noise(
    finished: tuple[Path, Comparison, Findings],
) -> None:
    folder, what, found = finished
    assert what.pairs == [
        (row, epsilon) for epsilon in (8.0, math.inf) for row in ("ffa-lora", "head-only")
    ]
    assert found.reference == "head-only"
    head, ffa = finals(folder, "head-only", 8.0), finals(folder, "ffa-lora", 8.0)
    assert found.against["ffa-lora", 8.0] == paired(ffa, head)
    assert found.noise["ffa-lora", 8.0] == paired(ffa, finals(folder, "ffa-lora", math.inf))
    initial = finals(folder, "ffa-lora", 8.0, "initial")
    assert initial == finals(folder, "head-only", math.inf, "initial")
    assert found.start_against[8.0] == paired(initial, head)
    table = (folder / "table.md").read_text()
    mean, std = (100 * f(initial.values()) for f in (statistics.mean, statistics.stdev))
    line = next(line for line in table.splitlines() if line.startswith("| no training"))
    # The picture of no training is the same at each ε.
    assert line.count(f" {mean:.1f} ± {std:.1f} ") == 2
    for text in ("Difference from head-only", "With noise minus without", "ffa-lora, no noise"):
        assert text in table


def test_without_tuning_a_control_is_the_run_without_privacy(
    finished: tuple[Path, Comparison, Findings],
) -> None:
    folder, what, found = finished
    rows = read_rows(folder / "rows.csv")
    assert set(rows["phase"]) == {"report"}
    assert len(rows) == what.most_runs == 2 * 2 * 2
    bare = finals(folder, "ffa-lora", math.inf)
    assert found.controls["ffa-lora", 8.0].mean == pytest.approx(statistics.mean(bare.values()))


def test_a_control_has_the_rates_clip_norm_and_batches_of_its_private_run(tmp_path: Path) -> None:
    what, _ = with_baselines(comparison(trials=2, seeds=1), "no-noise")
    rates = {("ffa-lora", 8.0): (0.1, 0.2, 0.3)}
    (control,), (private,) = what.control_jobs(rates), what.report_jobs(rates)
    assert control.phase == "control"
    assert replace(control.config, epsilon=8.0) == private.config
    assert math.isinf(control.config.epsilon)
    # The same rates without privacy are one run, and two ε with the same rates share a control.
    assert what.control_jobs({**rates, ("ffa-lora", math.inf): (0.1, 0.2, 0.3)}) == []
    wide = replace(what, epsilons=(3.0, 8.0))
    assert len(wide.control_jobs({**rates, ("ffa-lora", 3.0): (0.1, 0.2, 0.3)})) == 1
    mechanisms = [prepare_run(job.config).mechanisms for job in (private, control)]
    for noisy, bare in zip(*mechanisms, strict=True):
        assert replace(noisy, noise_multiplier=0.0) == bare
        assert noisy.noise_multiplier > 0


def test_a_tuned_control_is_in_the_file_and_is_what_that_run_alone_gives(tmp_path: Path) -> None:
    what, _ = with_baselines(comparison(trials=2, seeds=1), "no-noise")
    _, found = run_comparison(what, tmp_path / "cmp", lambda *_: None)
    rows = read_rows(tmp_path / "cmp" / "rows.csv").set_index("phase")
    assert list(rows.index) == ["tune", "tune", "report", "control"]
    private, control = rows.loc["report"], rows.loc["control"]
    config = RunConfig.of(
        SHARED.items(),
        {name: float(str(private[name])) for name in ("lr-a", "lr-b", "lr-head")},
        {"strategy": "ffa-lora", "seed": 1, "epsilon": math.inf},
    )
    summary = run_in_process(prepare_run(config), RunDirectory(tmp_path / "run"), lambda _: None)
    assert control["final"] == summary["final_accuracy"] != private["final"]
    difference = found.noise["ffa-lora", 8.0]
    assert difference.mean == private["final"] - control["final"]
    assert not difference.told_apart  # One seed tells nothing.


def test_baselines_can_be_asked_for_later_in_the_same_folder(
    finished: tuple[Path, Comparison, Findings], tmp_path: Path
) -> None:
    plain = comparison()
    told: list[Row | None] = []
    run_comparison(plain, tmp_path / "grown", lambda row, *_: told.append(row))
    assert [row["row"] for row in told if row] == ["ffa-lora"] * 2
    told.clear()
    more, _ = with_baselines(plain, "all")
    run_comparison(more, tmp_path / "grown", lambda row, *_: told.append(row))
    assert len([row for row in told if row]) == 8 - 2
    table = (finished[0] / "table.md").read_bytes()
    assert (tmp_path / "grown" / "table.md").read_bytes() == table
    settings = json.loads((tmp_path / "grown" / "settings.json").read_text())
    assert (settings["epsilons"], list(settings["rows"])) == (["8.0"], ["ffa-lora"])


@pytest.mark.parametrize("trials", [0, 6])
@pytest.mark.parametrize("count", [2, 5, 10])
@pytest.mark.parametrize("epsilons", [(3.0,), (1.0, 3.0, 8.0), (1.0, 3.0, 8.0, math.inf)])
def test_a_default_adds_at_most_half_as_many_runs(
    trials: int, count: int, epsilons: tuple[float, ...]
) -> None:
    names = ("dp-lora", "ffa-lora", "rolora", "la-lora", "as-lora", "fedsvd", "flexlora", "flora")
    rows = (*names, "fedex-lora", "fedsa-lora")[:count]
    plain = comparison(*rows, epsilons=epsilons, seeds=5, trials=trials)
    what, added = with_baselines(plain, "auto")
    assert {"no-training", HEAD_ONLY} <= set(added.names)
    assert added.added <= MOST_ADDED * added.named
    assert (added.named, added.named + added.added) == (plain.most_runs, what.most_runs)
    for name in added.left_out:
        more = replace(what, baselines=(*what.baselines, name))
        assert more.most_runs - added.named > MOST_ADDED * added.named


def test_the_number_of_runs_is_that_of_the_jobs() -> None:
    for baselines in ("none", "all", HEAD_ONLY, NO_PRIVACY, NO_NOISE):
        for trials in (0, 3):
            what, _ = with_baselines(comparison(epsilons=(1.0, 8.0), trials=trials), baselines)
            rates = {pair: (0.1, 0.2, 0.1 + n) for n, pair in enumerate(what.pairs)}
            own = rates if trials else what.choose({})
            jobs: list[Job] = [*what.tune_jobs(), *what.report_jobs(own), *what.control_jobs(own)]
            assert what.most_runs == len({job.key for job in jobs}) == len(jobs)


def test_one_row_always_gets_the_head_and_a_named_head_is_not_added_again() -> None:
    assert chosen(comparison(seeds=1)).names == ("no-training", HEAD_ONLY)
    what, added = with_baselines(comparison("ffa-lora", "head-only lr-head=0.1"), "head-only")
    assert added.added == 0
    assert [row.strategy for row in what.rows] == ["ffa-lora", HEAD_ONLY]
    assert what.compared_with == "head-only, lr-head 0.1"


def test_the_screen_says_what_is_added_and_what_is_not() -> None:
    lines = [*chosen(comparison(seeds=4)).lines()]
    assert lines == [
        "no-training, head-only: 4 more beside 4 runs (+100%)",
        "no-privacy is left out: 8 runs more would be too many. --baselines all adds them",
        "no-noise is left out: 8 runs more would be too many. --baselines all adds them",
    ]
    assert [*chosen(comparison(), "none").lines()] == []


def test_what_cannot_run_is_left_out_with_its_reason_unless_it_is_named() -> None:
    noisy = comparison(weighting="inverse-noise")
    assert set(chosen(noisy, "all").left_out) == {NO_PRIVACY, NO_NOISE}
    assert "epsilon = inf" in chosen(noisy, "all").left_out[NO_NOISE]
    headless = comparison(train_head=False)
    assert chosen(headless, "all").left_out == {HEAD_ONLY: "no head is trained and shared here"}
    by_sum = load_recipe("digits-secure-sum")
    what = Comparison(by_sum, read_methods(["ffa-lora"], by_sum), (1.0,), 1, 0)
    assert "trust-model = 'secure-sum'" in chosen(what, "all").left_out[NO_PRIVACY]
    with pytest.raises(InvalidValue, match="epsilon = inf"):
        run_comparison(with_baselines(noisy, NO_NOISE)[0], Path("/nowhere"), lambda *_: None)


def test_a_word_that_names_no_baseline_or_row_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="did you mean 'head-only'") as raised:
        with_baselines(comparison(), "head-onyl")
    assert all(name in str(raised.value) for name in BASELINES)
    what = replace(comparison(), reference="rolora")
    with pytest.raises(InvalidValue, match="reference = 'rolora'"):
        run_comparison(what, tmp_path / "new", lambda *_: None)
    assert not (tmp_path / "new").exists()
