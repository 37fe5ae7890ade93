"""Works out which method the measured rows support, for `fedlora plan` and for docs/results.md.

    python -m benchmarks.advice --write

It reads the reported rows below ``benchmarks/results`` and prints a table. ``--write`` writes the
table to docs/results.md, and ``fedlora_flwr/forecast/advice.toml``, which `fedlora plan` reads. No
run is made. `benchmarks.advice_rows` says which rows count, and `choose` is the rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from statistics import fmean, variance

from scipy.special import stdtrit  # type: ignore[import-untyped]

from benchmarks import ROOT
from benchmarks.advice_rows import HEAD, SOURCES, Run, runs
from benchmarks.page_tables import asked_to_write, replaced
from fedlora_flwr.config.toml import toml_value
from fedlora_flwr.config.trust import LOCAL, SECURE_SUM
from fedlora_flwr.files import replace_file
from fedlora_flwr.forecast.advice import TABLE, Measured, in_words, nearest
from fedlora_flwr.report.comparison import LEVEL
from fedlora_flwr.studies.paired import Difference, paired

PAGE = ROOT / "docs" / "results.md"
SECTION = "advice"
EPSILONS = (0.5, 1.0, 3.0, 8.0, math.inf)
# Two pairs have an interval of 13 standard errors, which says nothing.
FEWEST_PAIRS = 3
_NAMES = {
    "digits": "digits",
    "image-classification": "pictures, small Swin",
    "text-classification": "sentences, MiniLM",
}
_APART = {"alike": " ≈", "unknown": " (one seed)", "ahead": "", "behind": ""}
_TRUST = {LOCAL: "local noise", SECURE_SUM: "secure sum"}


def difference(one: Sequence[Run], other: Sequence[Run]) -> Difference:
    """Return the mean of ``one`` minus that of ``other``, with its 95 % interval.

    With at least three seeds in common it is paired by seed. Else it is Student's interval for two
    samples of the same variance, which needs two runs on one side at least.

    Parameters
    ----------
    one, other : Sequence[Run]
        Runs of two rows.

    Returns
    -------
    Difference
        Its ends are NaN where the runs give no interval.
    """
    finals = [{run.seed: run.final for run in runs} for runs in (one, other)]
    found = paired(*finals)
    if found and found.seeds >= FEWEST_PAIRS:
        return found
    a, b = (list(values.values()) for values in finals)
    mean, free = fmean(a) - fmean(b), len(a) + len(b) - 2
    if free < 1:
        return Difference(mean, math.nan, math.nan, 1)
    squares = sum(variance(values) * (len(values) - 1) for values in (a, b) if len(values) > 1)
    error = math.sqrt(squares / free * (1 / len(a) + 1 / len(b)))
    half = float(stdtrit(free, (1 + LEVEL) / 2)) * error
    return Difference(mean, mean - half, mean + half, min(len(a), len(b)))


def choose(rows: Mapping[str, Sequence[Run]]) -> tuple[str, str, dict[str, tuple[str, ...]]]:
    """Return the row to take, the one with the highest mean, and what the others are to that.

    The rule: of the best row and those that are not told apart from it, take the one that uploads
    the fewest bytes; among equal ones, the one that publishes no sizes; among these, the one with
    the highest mean. A row that gives no interval is no reason to leave the best.

    Parameters
    ----------
    rows : Mapping[str, Sequence[Run]]
        Runs by row, at one ε.
    """
    means = {name: round(fmean(run.final for run in found), 9) for name, found in rows.items()}
    best = max(means, key=lambda name: (means[name], -_uploaded(rows[name])))
    others: dict[str, list[str]] = {"alike": [], "behind": [], "open": []}
    for name in sorted(means.keys() - {best}, key=lambda name: (-means[name], name)):
        gap = difference(rows[best], rows[name])
        kind = "open" if math.isnan(gap.low) else "behind" if gap.told_apart else "alike"
        others[kind].append(name)

    def cost(name: str) -> tuple[int, bool, float]:
        return _uploaded(rows[name]), _publishes(rows[name]), -means[name]

    return min((best, *others["alike"]), key=cost), best, {k: tuple(v) for k, v in others.items()}


def _uploaded(found: Sequence[Run]) -> int:
    return round(fmean(run.uploaded for run in found))


def _publishes(found: Sequence[Run]) -> bool:
    """Tell whether a row sets weights by which clients' sizes become known."""
    return "weighting" in found[0].settings


def measured() -> Iterator[Measured]:
    """Yield what each task's rows say, by trust model and ε."""
    for task in _NAMES:
        for trust in _TRUST:
            sources = [one for one in SOURCES if (one.task, one.trust_model) == (task, trust)]
            for epsilon in sorted({e for source in sources for e in runs(source)}):
                rows: dict[str, list[Run]] = {}
                for source in sources:
                    for run in runs(source).get(epsilon, ()):
                        rows.setdefault(run.row, []).append(run)
                if epsilon in EPSILONS and rows.keys() - {HEAD}:  # Else there is nothing to choose.
                    section = next(s.section for s in sources if epsilon in runs(s))
                    yield _cell(task, trust, epsilon, sources[0].recipe, section, rows)


def _cell(
    task: str, trust: str, epsilon: float, recipe: str, section: str,
    rows: Mapping[str, Sequence[Run]],
) -> Measured:  # fmt: skip
    row, best, others = choose(rows)
    reason = "has the highest mean"
    if row != best:
        fewer = _uploaded(rows[row]) < _uploaded(rows[best])
        reason = "sends fewer bytes" if fewer else "publishes no sizes"
    adapters, gain = _over_the_head(rows)
    accuracy, highest = (fmean(run.final for run in rows[name]) for name in (row, best))
    return Measured(
        task=task, trust_model=trust, epsilon=epsilon, recipe=recipe,
        settings=rows[row][0].settings, row=row, accuracy=round(accuracy, 6), seeds=len(rows[row]),
        reason=reason, best=best, best_accuracy=round(highest, 6), **others,
        adapters=adapters, gain=round(gain, 6), section=section,
    )  # fmt: skip


def _over_the_head(rows: Mapping[str, Sequence[Run]]) -> tuple[str, float]:
    """Return what the best row with adapters is to the best one without, and their difference."""
    heads = {name: found for name, found in rows.items() if name.partition(",")[0] == HEAD}
    if not heads:
        return "unknown", math.nan
    _, one, _ = choose({name: found for name, found in rows.items() if name not in heads})
    gap = difference(rows[one], rows[choose(heads)[1]])
    if math.isnan(gap.low):
        return "unknown", gap.mean
    return "alike" if not gap.told_apart else "ahead" if gap.mean > 0 else "behind", gap.mean


def toml(found: Sequence[Measured]) -> str:
    """Return the package's table as TOML."""
    lines = [
        "# Which method the measured rows support. It is made from benchmarks/results by",
        "# `python -m benchmarks.advice --write`, and a test makes it again.",
    ]
    for one in found:
        lines += ["", "[[measured]]"]
        for each in fields(one):
            value = getattr(one, each.name)
            if isinstance(value, tuple):
                text = f"[{', '.join(toml_value(part) for part in value)}]"
            elif isinstance(value, Mapping):
                pairs = ", ".join(f"{key} = {toml_value(part)}" for key, part in value.items())
                text = f"{{ {pairs} }}"
            else:
                text = toml_value(value)
            lines.append(f"{each.name.replace('_', '-')} = {text}")
    return "\n".join(lines) + "\n"


def page_table(found: Sequence[Measured]) -> str:
    """Return the table of docs/results.md: each task, trust model and ε, carried over or not."""
    heads = ("task", "trust model", "ε", "take", "accuracy, %", "highest mean", "not told apart "
             "from it", "adapters over the head alone, points", "rows")  # fmt: skip
    lines = [heads, ("---",) * len(heads)]
    for task, name in _NAMES.items():
        for trust, words in _TRUST.items():
            for epsilon in EPSILONS:
                if trust == SECURE_SUM and not math.isfinite(epsilon):
                    continue  # A secure sum always has noise.
                one = nearest(task, trust, epsilon, found)
                assert one is not None
                lines.append((name, words, in_words(epsilon).removeprefix("ε = "),
                              *_cells(one, trust, epsilon)))  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(one: Measured, trust: str, epsilon: float) -> tuple[str, ...]:
    if (one.trust_model, one.epsilon) != (trust, epsilon):
        where = "local noise, " if one.trust_model != trust else ""
        return (f"`{one.row}`, carried over from {where}{in_words(one.epsilon)}", *("",) * 5)
    seeds = "1 seed" if one.seeds == 1 else f"{one.seeds} seeds"
    gain = (
        "not measured" if math.isnan(one.gain) else f"{100 * one.gain:+.1f}{_APART[one.adapters]}"
    )
    return (
        f"`{one.row}`", f"{100 * one.accuracy:.1f} ({seeds})",
        f"`{one.best}`, {100 * one.best_accuracy:.1f}",
        ", ".join(f"`{name}`" for name in one.alike) or ("not known" if one.open else "none"), gain,
        f"[here](#{one.section})",
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what the rows support, and write it if asked to."""
    write = asked_to_write("benchmarks.advice", __doc__, arguments)
    found = tuple(measured())
    table = page_table(found)
    print(table)
    if write:
        replace_file(TABLE, toml(found).encode())
        page = replaced(PAGE.read_text(encoding="utf-8"), SECTION, table)
        replace_file(PAGE, page.encode())


if __name__ == "__main__":
    main()
