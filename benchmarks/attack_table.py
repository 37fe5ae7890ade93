"""What `benchmarks.attacks` has measured, as the table of docs/reliability.md.

``python -m benchmarks.attack_table`` writes it into the page again, between two comments.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from benchmarks import ROOT
from benchmarks.attacks import BACKDOOR, CLIENTS, NOBODY, RESULTS, RULES, Cell, Outcome, cells, read
from benchmarks.page_tables import replaced

PAGE = ROOT / "docs" / "reliability.md"
MOST_UNATTACKED, MOST_ATTACKED = 1.0, 2.0
"""Points of accuracy that a robust rule may cost without an attack, and with one bad client."""

Found = Mapping[Cell, Outcome]


def cost(found: Found, of: Sequence[Cell]) -> float | None:
    """Return the mean loss against the mean without an attack, in points of accuracy.

    Parameters
    ----------
    found : Mapping[Cell, Outcome]
        The rows.
    of : Sequence[Cell]
        Runs that differ in their seeds alone. Each is compared with the honest run of its seed.

    Returns
    -------
    float or None
        None if the honest run of any of these seeds is missing.
    """
    honest = [replace(cell, bad=0, attack=NOBODY, rule="none") for cell in of]
    if not of or any(cell not in found for cell in honest):
        return None
    pairs = zip(honest, of, strict=True)
    return 100 * fmean(found[before].accuracy - found[after].accuracy for before, after in pairs)


def met(found: Found, of: Sequence[Cell]) -> bool | None:
    """Tell whether the runs behind an entry of the table meet their bar; None if it has no bar."""
    if not of or of[0].rule == "none" or of[0].bad > 1:
        return None
    lost = cost(found, of)
    if lost is None:
        return None
    most = MOST_ATTACKED if of[0].bad else MOST_UNATTACKED
    return lost <= most + 1e-9  # Accuracies are fractions, whose differences are rounded.


def table(found: Found) -> str:
    """Return accuracy in % by attack and rule, with the number of seeds, and the bar.

    A backdoor's cell also shows how often its mark works. A cell that was not run is a dash.
    """
    lines = ["| strategy | ε | attack | " + " | ".join(f"`{rule}`" for rule in RULES) + " |"]
    lines.append("|---" * (3 + len(RULES)) + "|")
    for (strategy, epsilon, bad, attack), rules in _grouped(found).items():
        who = attack if attack == NOBODY else f"{attack}, {bad} of {CLIENTS}"
        texts = [_text(found, rules[rule]) for rule in RULES]
        lines.append(f"| {strategy} | {epsilon:g} | {who} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _grouped(found: Iterable[Cell]) -> dict[tuple[str, float, int, str], dict[str, list[Cell]]]:
    """Return the runs by the table's rows and columns, in the grid's order."""
    measured = set(found)
    groups: dict[tuple[str, float, int, str], dict[str, list[Cell]]] = {}
    for cell in cells():
        if cell in measured:
            key = (cell.strategy, cell.epsilon, cell.bad, cell.attack)
            groups.setdefault(key, defaultdict(list))[cell.rule].append(cell)
    return groups


def _text(found: Found, of: Sequence[Cell]) -> str:
    if not of:
        return "–"
    text = f"{100 * fmean(found[cell].accuracy for cell in of):.1f} ({len(of)})"
    if of[0].attack == BACKDOOR:
        text += f" mark {100 * fmean(found[cell].triggered for cell in of):.0f} %"
    verdict = met(found, of)
    return text if verdict is None else f"{text} {'met' if verdict else '**short**'}"


def totals(found: Found) -> str:
    """Return in sentences how many bars are met and how much of the grid is missing."""
    groups = [of for rules in _grouped(found).values() for of in rules.values()]
    lines = []
    for name, attacked in (("Without an attack", False), ("With one bad client", True)):
        said = [met(found, of) for of in groups if bool(of[0].bad) is attacked]
        judged = [verdict for verdict in said if verdict is not None]
        lines.append(f"{name}, {sum(judged)} of {len(judged)} measured cells meet the bar.")
    grid = list(cells())
    done = sum(cell in found for cell in grid)
    if done == len(grid):
        return "\n".join([*lines, f"All {done:,} runs of the grid were made."])
    lines.append(f"The grid has {len(grid):,} runs, and {done:,} of them were made.")
    parts: dict[str, list[bool]] = defaultdict(list)
    for cell in grid:
        who = f"{cell.bad} of {CLIENTS}" if cell.bad else "no attack"
        parts[f"{cell.strategy}, ε = {cell.epsilon:g}, {who}, seed {cell.seed}"].append(
            cell in found
        )
    begun = {name: made for name, made in parts.items() if any(made)}
    lines.append("Runs made, by part of the grid (all other parts are missing):")
    lines.append("")
    lines.extend(f"- {name}: {sum(made)} of {len(made)}" for name, made in begun.items())
    return "\n".join(lines)


def section(found: Found) -> str:
    """Return what stands between the page's two comments."""
    return f"{table(found)}\n\n{totals(found)}"


def written(page: str, found: Found) -> str:
    """Return a page with the table of these rows.

    Raises
    ------
    ValueError
        The page lacks one of the two comments.
    """
    return replaced(page, "attacks", section(found))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the table of attacks into docs/reliability.md."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attack_table", description=main.__doc__
    )
    parser.add_argument("--rows", type=Path, default=RESULTS, help="CSV file of the grid")
    parser.add_argument("--page", type=Path, default=PAGE, help="page with the two comments")
    given = parser.parse_args(arguments)
    page = given.page.read_text("utf-8")
    given.page.write_text(written(page, read(given.rows)), "utf-8")


if __name__ == "__main__":
    main()
