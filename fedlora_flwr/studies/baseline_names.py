"""Names of a comparison's baselines. They are apart so that a shell's completion loads no more."""

from __future__ import annotations

from collections.abc import Mapping

NO_TRAINING, HEAD_ONLY = "no-training", "head-only"
NO_PRIVACY, NO_NOISE = "no-privacy", "no-noise"
BASELINES: Mapping[str, str] = {
    NO_TRAINING: "the figure of the start, which each run measures anyway",
    HEAD_ONLY: "a row in which the head alone trains",
    NO_PRIVACY: "a column without privacy, with rates of its own",
    NO_NOISE: "each row again at each ε: same rates, clip norm and batches, without noise",
}
"""What may stand beside the rows and budgets that a user names, in the order of their cost."""

AUTO, ALL, NONE = "auto", "all", "none"
CHOICES = (AUTO, ALL, NONE, *BASELINES)
"""Words of the option ``--baselines``."""
