"""Names of what chooses the rates to try. They are apart so that completion loads no more."""

from __future__ import annotations

from collections.abc import Mapping

HALTON, OPTUNA = "halton", "optuna"
SAMPLERS: Mapping[str, str] = {
    HALTON: "points that cover the ranges, the same for every row and ε",
    OPTUNA: "Optuna's TPE: each point follows from the earlier trials of the same row and ε",
}
"""What the option ``--sampler`` accepts."""
