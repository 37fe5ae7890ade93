"""The common part of all pictures: colors, resolution, and writing the file."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora_flwr.files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
# Colors of Okabe and Ito, which color-blind readers can tell apart.
MODES = {"A": "#0072B2", "B": "#E69F00", "AB": "#009E73", "": "#BBBBBB"}


def run_name(task: str, strategy: str, epsilon: float | None, seed: int) -> str:
    """Name a run in a title. An ε of infinity or None means no privacy."""
    private = epsilon is not None and math.isfinite(epsilon)
    budget = f"ε = {epsilon:g}" if private else "no privacy"
    return f"{task}, {strategy}, {budget}, seed {seed}"


def save(figure: Figure, path: Path) -> None:
    """Write a picture atomically."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    replace_file(path, content.getvalue())
