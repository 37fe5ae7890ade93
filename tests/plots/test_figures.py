from __future__ import annotations

import io
import json
import math
import struct
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.plots.accuracy import accuracy_figure, plot_accuracy
from fedlora_flwr.plots.figures import MODES, run_name
from fedlora_flwr.plots.modes import modes_figure, plot_modes
from fedlora_flwr.plots.rounds import ratios, rounds_figure
from fedlora_flwr.plots.splits import plot_split, split_figure

PLANS = ["B", "A", "BAB", "*AB", "BBB/BAB"]
BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]
# By hand from PLANS: one row a block, one column a round.
TRAINED = [["B", "A", "B", "AB", "B"], ["B", "A", "A", "A", "AB"], ["B", "A", "B", "B", "B"]]


SEEDS = (1, 2, 3)


def table(methods: int = 10, seeds: Sequence[int] = SEEDS) -> pd.DataFrame:
    draw = np.random.default_rng(0)
    rows = [
        {"row": f"method-{number}", "epsilon": epsilon, "seed": seed}
        for number in range(methods)
        for epsilon in (3.0, 1.0, 8.0, math.inf)
        for seed in seeds
    ]
    return pd.DataFrame(rows).assign(final=draw.uniform(0.2, 0.9, len(rows)))


def size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def draw(figure: Figure) -> None:
    """Work out colors and places."""
    figure.savefig(io.BytesIO())


def bars(frame: pd.DataFrame, private: bool = True) -> list[ErrorbarContainer]:
    """Return the means with their bars, one container per method: of budgets, or without any."""
    axes = accuracy_figure(frame, "accuracy", "Toys").axes[0]
    found = [c for c in axes.containers if isinstance(c, ErrorbarContainer)]
    return [c for c in found if (c.lines[0].get_fillstyle() == "full") is private]


def halves(container: ErrorbarContainer) -> list[float]:
    segments = [segment[:, 1] for segment in container.lines[2][0].get_segments()]
    return [(high - low) / 2 for low, high in segments]


def test_means_and_standard_errors_are_drawn_and_every_run() -> None:
    frame = table()
    private, without = bars(frame), bars(frame, private=False)
    assert [line.get_label() for line in private] == [f"method-{number}" for number in range(10)]
    dots = [
        line for line in accuracy_figure(frame, "accuracy", "Toys").axes[0].lines
        if line.get_linestyle() == "None" and len(np.asarray(line.get_xdata())) == 4 * len(SEEDS)
    ]  # fmt: skip
    assert len(dots) == 10
    for number, (_, rows) in enumerate(frame.groupby("row", sort=False)):
        np.testing.assert_array_equal(dots[number].get_ydata(), rows["final"])
        for drawn, budgets in ((private[number], (1.0, 3.0, 8.0)), (without[number], (math.inf,))):
            finals = [rows["final"][rows["epsilon"] == e].to_numpy() for e in budgets]
            means = [sum(f) / len(SEEDS) for f in finals]
            np.testing.assert_allclose(np.asarray(drawn.lines[0].get_ydata(), dtype=float), means)
            errors = [math.sqrt(sum((f - f.mean()) ** 2) / 2 / len(SEEDS)) for f in finals]
            np.testing.assert_allclose(halves(drawn), errors)


def test_points_stand_at_their_budget_and_no_line_leads_to_no_privacy() -> None:
    axes = accuracy_figure(table(), "accuracy", "Toys").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "3", "8", "no privacy"]
    ticks = axes.get_xticks()
    np.testing.assert_allclose(ticks[:3], np.log10([1, 3, 8]))
    for private, expected in ((True, [0, 1, 2]), (False, [3])):
        for line in bars(table(), private):
            places = np.asarray(line.lines[0].get_xdata(), dtype=float)
            assert [int(np.argmin(np.abs(ticks - place))) for place in places] == expected


def test_the_axis_of_the_metric_covers_every_run() -> None:
    runs = table()
    low, high = accuracy_figure(runs, "accuracy", "Toys").axes[0].get_ylim()
    assert low <= runs["final"].min() < low + 0.05
    assert high - 0.05 <= runs["final"].max() < high


def test_a_title_names_data_budgets_and_seeds() -> None:
    def title(frame: pd.DataFrame) -> str:
        return accuracy_figure(frame, "accuracy", "Toys").axes[0].get_title()

    assert title(table()).startswith("Toys: accuracy at ε = 1, 3, 8 and no privacy, seeds 1 to 3\n")
    assert title(table(seeds=[1, 4])).split("\n")[0].endswith(", 2 seeds")
    one = title(table(seeds=[4]))
    assert one.endswith("no privacy, seed 4, so there are no error bars")
    frame = table()
    assert "no privacy" not in title(frame[frame["epsilon"] < 9])


def test_eleven_methods_look_different() -> None:
    looks = {(line.lines[0].get_color(), line.lines[0].get_marker()) for line in bars(table(11))}
    assert len({color for color, _ in looks}) == len({marker for _, marker in looks}) == 11
    more = {(line.lines[0].get_color(), line.lines[0].get_linestyle()) for line in bars(table(25))}
    assert len(more) == 25


def test_a_failed_run_is_left_out_and_one_run_has_no_bar() -> None:
    frame = table(1)
    frame.loc[frame["epsilon"] == 3, "final"] = math.nan
    frame.loc[(frame["epsilon"] == 8) & (frame["seed"] > 1), "final"] = math.nan
    (line,) = bars(frame)
    assert len(np.asarray(line.lines[0].get_ydata())) == 2
    lengths = [len(segment) for segment in line.lines[2][0].get_segments()]
    assert lengths == [2, 0]


@pytest.mark.parametrize("epsilons", [[math.inf], [2.0], [2.0, math.inf], [0.5, 4.0]])
def test_few_budgets_can_be_drawn(epsilons: list[float], tmp_path: Path) -> None:
    frame = table(3)
    frame = frame[frame["epsilon"] == 1.0]
    every = pd.concat([frame.assign(epsilon=epsilon) for epsilon in epsilons])
    axes = accuracy_figure(every, "f1", "Toys").axes[0]
    names = ["no privacy" if math.isinf(epsilon) else f"{epsilon:g}" for epsilon in epsilons]
    assert [label.get_text() for label in axes.get_xticklabels()] == names
    assert "f1" in axes.get_ylabel()
    plot_accuracy(every, tmp_path / "few.png", "f1", "Toys")
    assert size(tmp_path / "few.png")[0] > 800


def test_the_accuracy_picture_is_small_and_wide_enough(tmp_path: Path) -> None:
    plot_accuracy(table(), tmp_path / "accuracy.png", "accuracy", "Toys")
    width, height = size(tmp_path / "accuracy.png")
    assert 1000 < width < 2000
    assert 600 < height < 1200
    assert (tmp_path / "accuracy.png").stat().st_size < 300_000
    assert [path.name for path in tmp_path.iterdir()] == ["accuracy.png"]


def test_modes_are_drawn_as_planned() -> None:
    figure = modes_figure(PLANS, BLOCKS)
    axes = figure.axes[0]
    (mesh,) = axes.collections
    draw(figure)
    expected = [to_rgba(MODES[mode]) for row in TRAINED for mode in row]
    np.testing.assert_allclose(np.asarray(mesh.get_facecolor()), np.array(expected))
    assert [label.get_text() for label in axes.get_yticklabels()] == BLOCKS
    low, high = axes.get_ylim()
    assert low > high, "the first block is at the top"
    assert axes.get_xlim() == (0.5, len(PLANS) + 0.5)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["A", "B", "A and B"]
    shown = [to_rgba(patch.get_facecolor()) for patch in figure.legends[0].get_patches()]
    assert shown == [to_rgba(MODES[name]) for name in ("A", "B", "AB")]
    named = modes_figure(["B", "A"], BLOCKS, run_name("toys", "as-lora", 8.0, 1))
    assert named.axes[0].get_title().endswith("\ntoys, as-lora, ε = 8, seed 1")
    assert [text.get_text() for text in named.legends[0].get_texts()] == ["A", "B"]
    assert run_name("toys", "as-lora", math.inf, 1) == "toys, as-lora, no privacy, seed 1"
    assert run_name("toys", "as-lora", None, 1) == "toys, as-lora, no privacy, seed 1"


@pytest.mark.parametrize(("blocks", "rounds"), [(4, 5), (12, 40), (48, 200), (1, 1)])
def test_labels_of_many_blocks_do_not_overlap(blocks: int, rounds: int, tmp_path: Path) -> None:
    names = [f"encoder.layers.{number}" for number in range(blocks)]
    figure = modes_figure(["BA" * (blocks // 2) or "B"] * rounds, names)
    draw(figure)
    axes = figure.axes[0]
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes))
    assert all(box.x0 >= 0 for box in boxes), "no label is cut off"
    assert all(tick == int(tick) for tick in axes.get_xticks())
    plot_modes(["B"] * rounds, names, tmp_path / "modes.png")
    width, height = size(tmp_path / "modes.png")
    assert 600 < width <= 2400
    assert 300 < height < 2000


@pytest.mark.parametrize(("plans", "blocks"), [([], ["a"]), (["B"], []), (["BA"], ["a", "b", "c"])])
def test_what_is_no_grid_is_refused(plans: list[str], blocks: list[str], tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="plan"):
        plot_modes(plans, blocks, tmp_path / "modes.png")
    assert not list(tmp_path.iterdir())


def test_matplotlib_is_loaded_only_to_draw() -> None:
    code = "import sys, fedlora_flwr.plots.accuracy; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def counts(clients: int, classes: int) -> pd.DataFrame:
    draw = np.random.default_rng(0)
    return pd.DataFrame(
        draw.integers(0, 50, (clients, classes)) * draw.integers(0, 2, (clients, 1))
    )


@pytest.mark.parametrize(("clients", "classes"), [(2, 2), (5, 10), (100, 20)])
def test_bars_are_the_counts_from_left_to_right(clients: int, classes: int) -> None:
    frame = counts(clients, classes)
    axes = split_figure(frame, "digits").axes[0]
    drawn = [[patch.get_width() for patch in bars.patches] for bars in axes.containers]  # type: ignore[attr-defined]
    assert np.array(drawn).T.tolist() == frame.to_numpy().tolist()
    starts = [[patch.get_x() for patch in bars.patches] for bars in axes.containers]  # type: ignore[attr-defined]
    before = frame.cumsum(axis=1) - frame
    assert np.array(starts).T.tolist() == before.to_numpy().tolist()
    colors = {patch.get_facecolor() for bars in axes.containers for patch in bars.patches}  # type: ignore[attr-defined]
    assert len(colors) == classes
    low, high = axes.get_ylim()
    assert low > high, "the first client is at the top"


def test_many_classes_are_a_map_with_white_for_none() -> None:
    frame = counts(30, 21)
    frame.iloc[0] = 0
    figure = split_figure(frame, "digits")
    axes = figure.axes[0]
    (mesh,) = axes.collections
    shown = mesh.get_array()
    assert shown is not None
    values = np.ma.filled(shown, 0).reshape(30, 21)
    np.testing.assert_array_equal(values, frame.to_numpy())
    draw(figure)
    assert np.asarray(mesh.get_facecolor())[:21].tolist() == [[1, 1, 1, 1]] * 21


@pytest.mark.parametrize(("clients", "classes"), [(2, 2), (2, 20), (100, 200), (100, 3), (1, 1)])
def test_names_on_a_split_do_not_overlap(clients: int, classes: int, tmp_path: Path) -> None:
    figure = split_figure(counts(clients, classes) + 1, "tiny-imagenet, dirichlet")
    draw(figure)
    axes = figure.axes[0]
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes))
    for legend in figure.legends:
        axis = axes.xaxis.get_tightbbox()
        assert axis is not None
        assert legend.get_window_extent().y1 < axis.y0
        assert legend.get_window_extent().x0 > 0
    plot_split(counts(clients, classes) + 1, tmp_path / "split.png", "digits")
    width, height = size(tmp_path / "split.png")
    assert 1000 < width < 1600
    assert 300 < height <= 2100


def test_a_split_without_clients_or_classes_is_refused(tmp_path: Path) -> None:
    for clients, classes in ((0, 2), (2, 0)):
        with pytest.raises(InvalidValue, match="counts"):
            plot_split(counts(clients, classes), tmp_path / "split.png", "digits")
    assert not list(tmp_path.iterdir())


def rounds(count: int = 6) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"round": 0, "accuracy": 0.1}]
    for number in range(1, count + 1):
        parts = ("B", "head") if number % 2 else ("A", "head")
        rows.append(
            {
                "round": number,
                "agreement": dict.fromkeys(parts, 0.1 * number),
                "signal": dict.fromkeys(parts, 0.0 if number == 3 else 2.0),
                "spread": dict.fromkeys(parts, 4.0 * number),
                "noise": dict.fromkeys(parts, 3.0 * number),
                "mean_error": 0.0 if number == 2 else 0.25,
            }
            | ({"accuracy": 0.2} if number % 3 == 0 else {})
        )
    return rows


def test_the_rounds_of_a_run_are_drawn_as_they_are() -> None:
    rows = rounds()
    assert ratios(rows, "spread", "B") == [(1, 2.0), (3, pytest.approx(math.nan, nan_ok=True)),
                                           (5, 10.0)]  # fmt: skip
    assert ratios(rows, "noise", "A") == [(2, 3.0), (4, 6.0), (6, 9.0)]
    figure = rounds_figure(rows, "accuracy")
    metric, agreement, ratio, error = figure.axes
    assert metric.lines[0].get_xydata().tolist() == [[0, 0.1], [3, 0.2], [6, 0.2]]  # type: ignore[union-attr]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["factor A", "factor B", "head"]
    np.testing.assert_allclose(np.asarray(agreement.lines[0].get_ydata()), [0.2, 0.4, 0.6])
    assert ratio.get_yscale() == "log"
    assert len(ratio.lines) == 6
    np.testing.assert_array_equal(
        np.asarray(error.lines[0].get_ydata()), [0.25, 0, 0.25, 0.25, 0.25, 0.25]
    )
    draw(figure)


def test_rounds_without_figures_leave_their_panels_empty() -> None:
    """Rows of earlier versions, and of a run with one client a round."""
    figure = rounds_figure([{"round": 0}, {"round": 1, "mean_error": None}], "accuracy")
    assert [len(axes.lines) for axes in figure.axes] == [0, 1, 0, 0]
    draw(figure)
    with pytest.raises(InvalidValue, match="rounds"):
        rounds_figure([{"round": 0}], "accuracy")


def test_the_command_draws_a_run_that_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    missing = CliRunner().invoke(app, ["plot", str(folder)])
    assert missing.exit_code == 1
    assert "rounds.jsonl" in missing.output
    assert not folder.exists()
    folder.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rounds())
    (folder / "rounds.jsonl").write_text(lines)
    assert CliRunner().invoke(app, ["plot", str(folder)]).exit_code == 0
    assert size(folder / "rounds.png")[0] > 1000
    other = CliRunner().invoke(app, ["plot", str(folder), "--output", str(tmp_path / "a.pdf")])
    assert ".png file" in other.output
