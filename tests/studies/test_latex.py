"""``table.tex`` has the tables of ``table.md``, with signs that LaTeX reads as they are meant."""

from __future__ import annotations

import re

from fedlora_flwr.studies.compare_tables import Part, markdown
from fedlora_flwr.studies.latex import latex

PARTS: list[Part] = [
    "# a_task, secure sum simulated: accuracy in % after round 20",
    [
        ["method", "ε = 1", "no privacy", "kB up"],
        ["rolora, lr-b=1 & more", "**55.0 ± 7.1**", "50.0 (1 failed)", "1,234.5"],
        ["head-only", "≈ -0.3 [-1.2, +0.5]", "–", "0.1 / 1e-05 / 2"],
    ],
    "Mean ± sample standard deviation; bold: best of its column.",
    "Difference from head-only in points",
    [["method", "ε = 1"], ["rolora", "-2.0"]],
    "Intervals at 95%.",
]


def plain(cell: str) -> str:
    """Return what a reader of the printed cell sees, by the meaning of each command."""
    cell = re.sub(r"\\textbf\{(.*)\}", r"\1", cell)
    commands = {r"$\varepsilon$": "ε", r"$\pm$": "±", r"$\approx$": "≈", "--": "–", "$-$": "-"}
    for command, sign in commands.items():
        cell = cell.replace(command, sign)
    return re.sub(r"\\([&%$#_{}])", r"\1", cell).strip()


def test_tables_have_the_cells_of_the_markdown_file() -> None:
    text = latex(PARTS)
    rows = [
        [plain(cell) for cell in re.split(r"(?<!\\)&", line.removesuffix(r"\\"))]
        for line in text.splitlines()
        if line.endswith(r" \\")
    ]
    shown = [
        [cell.strip().replace("**", "") for cell in line.strip("|").split("|")]
        for line in markdown(PARTS).splitlines()
        if line.startswith("|") and not line.startswith("|-")
    ]
    assert rows == shown
    assert r"\textbf{55.0 $\pm$ 7.1}" in text
    assert "0.1 / 1e-05 / 2" in text  # An exponent keeps its plain minus.


def test_each_table_is_a_float_with_caption_rules_and_notes() -> None:
    text = latex(PARTS)
    for command in (r"\toprule", r"\midrule", r"\bottomrule", r"\end{table}", r"\caption{"):
        assert text.count(command) == 2, command
    first, second = text.split(r"\end{table}")[:2]
    assert r"\caption{a\_task, secure sum simulated: accuracy in \% after round 20}" in first
    assert r"\footnotesize Mean $\pm$ sample standard deviation" in first
    assert r"\begin{tabular}{lrrr}" in first
    assert r"\caption{Difference from head-only in points}" in second
    assert r"Intervals at 95\%." in second
    assert text.count("{") == text.count("}")
