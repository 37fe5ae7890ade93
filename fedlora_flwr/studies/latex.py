"""The report of a comparison in LaTeX, with tables of the package ``booktabs``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedlora_flwr.studies.compare_tables import Part

_SIGNS = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "ε": r"$\varepsilon$", "σ": r"$\sigma$", "δ": r"$\delta$", "∞": r"$\infty$",
    "±": r"$\pm$", "≈": r"$\approx$", "≤": r"$\leq$", "–": "--", "…": r"\dots{}",
}  # fmt: skip
_MINUS = re.compile(r"(?<![\w.])-(?=\d)")
_BOLD = re.compile(r"\*\*(.+?)\*\*")


def latex(parts: Sequence[Part]) -> str:
    """Return ``table.tex``: a floating table per table, with the same cells as ``table.md``.

    A text before a table is its caption. Other texts are notes below the table before them.

    Parameters
    ----------
    parts : Sequence[Part]
        See `document_of`.
    """
    lines = [r"% Needs \usepackage{booktabs}."]
    for at, part in enumerate(parts):
        following = parts[at + 1] if at + 1 < len(parts) else ""
        if isinstance(part, str):
            if isinstance(following, str):
                lines += [r"  \par\smallskip\footnotesize " + _escaped(part)]
            else:
                lines += [*_end(lines), r"\begin{table}", r"  \centering"]
                lines += [rf"  \caption{{{_escaped(part.removeprefix('# '))}}}"]
        else:
            lines += _tabular(part)
    return "\n".join([*lines, *_end(lines), ""])


def _end(lines: Sequence[str]) -> list[str]:
    """Return the end of the table that is open, if one is."""
    return [r"\end{table}", ""] if r"\begin{table}" in lines else [""]


def _tabular(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = ("    " + " & ".join(_escaped(cell) for cell in row) + r" \\" for row in rows)
    columns = "l" + "r" * (len(rows[0]) - 1)
    return [
        rf"  \begin{{tabular}}{{{columns}}}",
        r"    \toprule",
        head,
        r"    \midrule",
        *body,
        r"    \bottomrule",
        r"  \end{tabular}",
    ]


def _escaped(text: str) -> str:
    """Write a text of the report in LaTeX."""
    signed = "".join(_SIGNS.get(sign, sign) for sign in _MINUS.sub("\N{MINUS SIGN}", text))
    return _BOLD.sub(r"\\textbf{\1}", signed.replace("\N{MINUS SIGN}", "$-$"))
