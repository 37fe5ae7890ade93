"""AS-LoRA: the factor is chosen by score, for each block and round (arXiv 2605.05769)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from flwr.serverapp.strategy import Result
from numpy.typing import NDArray

from fedlora_flwr.aggregation import Arrays, normalise
from fedlora_flwr.errors import FedLoRAError, InvalidValue
from fedlora_flwr.plan import A, B, ComponentPlan, Layout
from fedlora_flwr.randomness import stream_seed
from fedlora_flwr.strategies.base import FedLoRA
from fedlora_flwr.strategies.replies import Upload
from fedlora_flwr.wire import CURVATURE

WARMUP = 0.1  # share of the rounds in which all blocks alternate alike
DECAY = 0.95  # of the temperature, a round
COLDEST = 0.1
MEMORY = 0.9  # of the scores' moving averages


class ASLoRA(FedLoRA):
    """Train one factor a block, drawn by how much each has lately promised to lower the loss.

    In the first tenth of the rounds all blocks train B and A in turn, B first. Then block by block
    ``p(A) = sigmoid((S_A - S_B) / (|S_A| + |S_B|) / τ)`` with moving averages S of the clients'
    scores and a temperature τ that falls to 0.1; a factor without a score yet is chosen. One factor
    of a block is frozen for a whole round, so each block's mean is exact. Source: arXiv 2605.05769.

    Parameters
    ----------
    curvature : str (default: "none")
        ``"secant"`` multiplies scores by the decrease that the curvature leaves (`BlockScores`).
    **kwargs
        Those of `FedLoRA`.
    """

    settings: ClassVar[tuple[str, ...]] = ("curvature",)

    def __init__(self, *args: Any, curvature: str = "none", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if curvature not in ("none", "secant"):
            raise InvalidValue("curvature", curvature, "'none' or 'secant'")
        self.curvature = curvature
        self.scores: dict[str, list[float | None]] = {}
        """Moving average by factor, one a block; None before its first score."""

    def start(self, *args: Any, **kwargs: Any) -> Result:
        """Run the federation, with no scores from an earlier one."""
        self.scores = {}
        return super().start(*args, **kwargs)

    def instructions(self) -> dict[str, str]:
        """Ask for scores."""
        return {CURVATURE: self.curvature}

    def plan(self, server_round: int, layout: Layout) -> ComponentPlan:
        """Draw the blocks' modes.

        Raises
        ------
        InvalidValue
            A layer is in no named block.
        """
        layout.check_blocks()
        count = len(layout.blocks)
        if not self.scores:
            self.scores = {A: [None] * count, B: [None] * count}
        warmup = math.floor(WARMUP * self.num_rounds)
        if server_round <= warmup:
            return ComponentPlan.uniform((B if server_round % 2 else A) * count)
        generator = np.random.default_rng(stream_seed(self.seed, "modes", server_round))
        temperature = max(COLDEST, DECAY ** (server_round - warmup))
        draws = generator.random(count)
        modes = [self._mode(block, temperature, draw) for block, draw in enumerate(draws.tolist())]
        return ComponentPlan.uniform("".join(modes))

    def check_upload(self, current: Arrays, upload: Upload) -> None:
        """Refuse an upload without exactly one score per block.

        Raises
        ------
        FedLoRAError
            There are more or fewer.
        """
        self.check_shapes(current, upload.arrays)
        count = len(Layout.of(current, self.blocks).blocks)
        if len(upload.scores) != count:
            raise FedLoRAError(
                f"it sent {len(upload.scores)} scores for {count} blocks. as-lora needs a client "
                "that scores blocks, such as LoRAClient or one that calls follow_plan"
            )

    def aggregate(
        self, server_round: int, current: Arrays, uploads: Sequence[Upload]
    ) -> dict[str, NDArray[np.floating]]:
        """Average the active factors, and move the scores of those alone."""
        arrays = super().aggregate(server_round, current, uploads)
        modes = str(self._plan)
        shares = normalise([upload.weight for upload in uploads])
        # Clamped after the mean: clamping each client's estimate would turn noise into score.
        means = np.maximum(shares @ np.array([upload.scores for upload in uploads]), 0.0)
        for block, (mode, score) in enumerate(zip(modes, means.tolist(), strict=True)):
            before = self.scores[mode][block]
            self.scores[mode][block] = (
                score if before is None else MEMORY * before + (1 - MEMORY) * score
            )
        if self.last_round is not None:
            self.last_round.details = {
                "scores": means.tolist(),
                "scores_A": list(self.scores[A]),
                "scores_B": list(self.scores[B]),
            }
        return arrays

    def _mode(self, block: int, temperature: float, draw: float) -> str:
        of_a, of_b = self.scores[A][block], self.scores[B][block]
        # B first also where neither has a score: while B = 0 the gradient of A is zero.
        if of_b is None:
            return B
        if of_a is None:
            return A
        lead = (of_a - of_b) / (abs(of_a) + abs(of_b) + 1e-8)
        chance = 1 / (1 + math.exp(-min(max(lead / temperature, -30), 30)))
        return A if draw < chance else B
