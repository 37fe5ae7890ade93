from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import ROOT
from benchmarks.figures import Figure, operators, peak_bytes, table, take_turns
from benchmarks.suite import BENCHMARKS, run_suite
from fedlora_flwr.errors import InvalidValue

FIGURES = {
    "met": Figure("a step", 0.9, 1.0, "s", "plain", 1.0),
    "not met": Figure("a step", 1.2, 1.0, "s", "plain", 1.0),
    "no bar": Figure("a step", 3.0, 2.0, "s", "hooks"),
    "failed": Figure("a step", 1.0, None, "s", "hooks", 1.0, "fails: RuntimeError"),
}


@pytest.mark.parametrize(
    ("name", "ratio", "met"),
    [("met", 0.9, True), ("not met", 1.2, False), ("no bar", 1.5, None), ("failed", None, None)],
)
def test_a_bar_is_met_up_to_it(name: str, ratio: float | None, met: bool | None) -> None:
    figure = FIGURES[name]
    assert (figure.ratio, figure.met) == (ratio, met)
    assert figure.as_dict()["ratio"] == ratio
    assert Figure("x", 1.0, 1.0, "s", "y", 1.0).met is True


def test_the_table_says_what_was_met_and_why_a_figure_is_missing() -> None:
    lines = [line for line in table(list(FIGURES.values())).lines() if "a step" in line]
    words = [" ".join(line.split()) for line in lines]
    assert words == [
        "a step 0.9 s 1 s 0.9 ≤ 1 yes plain",
        "a step 1.2 s 1 s 1.2 ≤ 1 no plain",
        "a step 3 s 2 s 1.5 hooks",
        "a step 1 s – ≤ 1 hooks (fails: RuntimeError)",
    ]


def test_calls_take_turns_after_a_warm_up() -> None:
    made: list[str] = []
    seconds = take_turns({name: lambda name=name: made.append(name) for name in "ab"}, 3)  # type: ignore[misc]
    assert made == ["a", "b"] * 4
    assert set(seconds) == {"a", "b"}
    assert all(value >= 0 for value in seconds.values())


def test_the_peak_counts_what_is_held_at_once() -> None:
    def one_after_the_other() -> None:
        for _ in range(3):
            torch.zeros(250_000)

    def together() -> None:
        held = [torch.zeros(250_000) for _ in range(3)]
        assert len(held) == 3

    assert peak_bytes(one_after_the_other) == pytest.approx(1e6, rel=0.01)
    assert peak_bytes(together) == pytest.approx(3e6, rel=0.01)


def test_the_suite_shows_and_writes_every_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quick(on_figure: object) -> None:
        """Two figures."""
        for name in ("met", "failed"):
            on_figure(FIGURES[name])  # type: ignore[operator]

    monkeypatch.setattr("benchmarks.suite.BENCHMARKS", {"quick": quick})
    console, output = (
        Console(width=160, record=True, file=io.StringIO()),
        tmp_path / "new" / "bench.json",
    )

    run_suite([], output, console)

    assert "quick: Two figures." in console.export_text()
    content = json.loads(output.read_text())
    assert content["figures"] == {"quick": [FIGURES[n].as_dict() for n in ("met", "failed")]}
    assert content["command"] == "python -m benchmarks"
    assert {"torch", "opacus", "python"} <= content["versions"].keys()
    assert content["machine"].keys() == {"cpu", "cores", "gpu", "load_average"}


def test_an_unknown_benchmark_is_refused_before_any_runs(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match=r"benchmark = 'stepp' .*'step'"):
        run_suite([*BENCHMARKS, "stepp"], tmp_path / "b.json", Console(quiet=True))
    assert not list(tmp_path.iterdir())


def test_operators_are_counted_forwards_and_backwards_but_for_views() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    assert operators(lambda: x.t()[0].detach()) == 0
    assert operators(lambda: (x * 2).sum()) == 2
    # Of the gradient: ones like the sum, its expansion is a view, times two.
    assert operators(lambda: torch.autograd.grad((x * 2).sum(), x)) > 3


def test_an_unknown_benchmark_is_one_sentence_with_the_nearest_name() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "stepp"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "did you mean 'step'?" in done.stderr
    assert "Traceback" not in done.stderr
