"""The notebook runs from top to bottom, shows what is right, and holds what it shows."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant

import fedlora_flwr
from tests.examples.projects import EXAMPLES

NOTEBOOK = EXAMPLES / "explained" / "private_federated_lora.ipynb"
if not NOTEBOOK.exists():
    pytest.skip("the source archive leaves out notebooks", allow_module_level=True)
CELLS: list[dict[str, Any]] = [
    cell
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "code"
]
SOURCES = ["".join(cell["source"]) for cell in CELLS]


@dataclass(frozen=True)
class Executed:
    """What the cells left: their names, what each printed, and how many pictures each drew."""

    names: dict[str, Any]
    printed: list[str]
    pictures: list[int]


@pytest.fixture(scope="module")
def executed() -> Iterator[Executed]:
    """Run all cells in order, in one namespace; an error in a cell is an error here."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = Executed({"__name__": "__main__"}, [], [])
    flower = logging.getLogger("flwr")
    level = flower.level
    try:
        with matplotlib.rc_context():
            for number, source in enumerate(SOURCES, start=1):
                with redirect_stdout(io.StringIO()) as out:
                    exec(compile(source, f"<cell {number}>", "exec"), found.names)
                found.printed.append(out.getvalue())
                found.pictures.append(len(plt.get_fignums()))
                plt.close("all")
        yield found
    finally:
        flower.setLevel(level)
        found.names["folder"].cleanup()


def test_the_file_holds_what_the_cells_show_now(executed: Executed) -> None:
    outputs = [cell["outputs"] for cell in CELLS]
    assert [cell["execution_count"] for cell in CELLS] == [*range(1, len(CELLS) + 1)]
    assert [kind for cell in outputs for kind in cell if kind["output_type"] == "error"] == []
    drawn = [sum("image/png" in shown.get("data", {}) for shown in cell) for cell in outputs]
    assert drawn == executed.pictures
    assert sum(drawn) >= 7
    texts = ["".join("".join(shown.get("text", "")) for shown in cell) for cell in outputs]
    assert list(map(without_numbers, texts)) == list(map(without_numbers, executed.printed))


def without_numbers(text: str) -> str:
    """Mask numbers, whose last digits depend on the machine."""
    return re.sub(r"\d[\d,.]*(e[+-]?\d+)?", "#", text)


def test_the_file_is_small_enough_to_be_shown() -> None:
    assert NOTEBOOK.stat().st_size < 300_000


def test_only_public_names_of_the_package_are_used() -> None:
    used = {name for source in SOURCES for name in re.findall(r"\bfedlora\.(\w+)", source)}
    assert len(used) > 15
    assert used <= set(fedlora_flwr.__all__)
    imports = {line for source in SOURCES for line in source.splitlines() if "fedlora_flwr" in line}
    assert imports == {"import fedlora_flwr as fedlora"}


def test_every_private_record_is_with_one_client(executed: Executed) -> None:
    assert executed.names["counts"].sum() == 1797 - 360


def test_the_cross_term_is_what_averaging_gets_wrong(executed: Executed) -> None:
    names = executed.names
    np.testing.assert_allclose(names["wanted"] - names["got"], names["cross"], atol=1e-6)
    assert names["error_both"] > 0.01
    assert names["error_frozen"] < 1e-6


def test_one_record_moves_the_drawn_step_by_the_clip_norm_over_the_batch(
    executed: Executed,
) -> None:
    names = executed.names
    gradients = names["points"][: names["SIZE"]].numpy()  # The loss is -x·a, so a moves along x.
    lengths = np.linalg.norm(gradients, axis=1, keepdims=True)
    np.testing.assert_allclose(names["own"], gradients / np.maximum(lengths, 1), atol=1e-5)
    np.testing.assert_allclose(names["clean"], names["own"].mean(axis=0), atol=1e-6)
    assert names["moved"] == pytest.approx(1 / 8, rel=1e-4)
    # 400 draws of a normal deviation: four standard errors are 14 %.
    assert (names["noisy"] - names["clean"]).std() == pytest.approx(1 / 8, rel=0.15)


def test_epsilon_over_rounds_ends_at_the_budget_and_agrees_with_another_accountant(
    executed: Executed,
) -> None:
    names = executed.names
    for budget, curve in names["curves"].items():
        assert curve == sorted(curve)
        assert 0.99 * budget < curve[-1] <= budget
    other = PLDAccountant()
    step = PoissonSampledDpEvent(names["rate"], GaussianDpEvent(names["noise"][3.0]))
    other.compose(step, names["steps"])
    assert names["curves"][3.0][0] == pytest.approx(other.get_epsilon(1e-3), rel=0.02)


def test_the_run_keeps_its_promise_and_plain_peft_gives_its_accuracy(executed: Executed) -> None:
    names = executed.names
    for _, accuracy, epsilon in names["runs"].values():
        assert accuracy[-1] > accuracy[0] + 0.1
        assert 0.99 * 8 < epsilon[-1] <= 8
    printed = "".join(executed.printed)
    assert re.findall(r"trained (.*)", printed) == ["['A', 'B']", "['B']", "['A', 'B']"]
    assert names["peft_accuracy"] == pytest.approx(names["accuracy"][-1])
