"""AS-LoRA: the factor is chosen by score, for each block and round (arXiv 2605.05769)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.algebra.gains import Estimate, Movement, across, movements, secant
from fedlora_flwr.algebra.means import Arrays
from fedlora_flwr.algebra.update_sums import UpdateSums
from fedlora_flwr.config.sections.as_lora import ASLoRASection
from fedlora_flwr.layout import Layout, factor_of
from fedlora_flwr.plan import A, B, ComponentPlan
from fedlora_flwr.randomness import stream_seed
from fedlora_flwr.schedules import Schedule
from fedlora_flwr.strategies.base import FedLoRA
from fedlora_flwr.strategies.choices import Choice, Scores, chance_of_a, lead, verdict
from fedlora_flwr.strategies.replies import Upload

_STILL = 1e-12  # a learning rate up to this value counts as zero


class ASLoRA(FedLoRA):
    """Train one factor per block, the one that has lately lowered the loss more.

    In the first rounds all blocks train B and A in turn, B first. Then each block draws A with the
    probability that A's score exceeds B's, given the standard errors of both; a factor without a
    score yet is chosen. A score estimates by how much a round lowered the loss through one factor
    of one block. The server computes it from the uploads alone (`fedlora_flwr.algebra.gains`):
    clients report nothing else, and the server need not know their noise. One factor of a block is
    frozen for a whole round, so each block's mean is exact. Source: arXiv 2605.05769.

    Parameters
    ----------
    curvature : str (default: "none")
        ``"secant"`` subtracts from a score the cost of curvature and noise, which it estimates
        from the next round. It needs plain SGD.
    curvature_rounds : int (default: 0)
        Number of last rounds that use ``curvature``; 0 for all rounds.
    selection : str (default: "sample")
        ``"sample"`` draws; ``"argmax"`` takes the likelier factor; ``"fixed"`` ignores scores, and
        trains B and A in turn to the end.
    groups : str (default: "block")
        What has a choice of its own: each ``"block"``, all of them together (``"tied"``), or each
        ``"layer"``. The last is ``blocks=".+"``, which clients of a project's own must be given.
    temperature : float (default: 1)
        Divides the difference of scores in units of its standard error.
    explore : float (default: 0.02)
        Least probability of either factor.
    score_decay : float (default: 0.9)
        Weight of the past in a score's mean; 0 for the last round alone.
    score_drift : float (default: 0.2)
        Share of both scores together by which their difference may change in a round in which one
        of them is not renewed. The leading factor is thus left now and then to test the other.
    warm_up : float (default: 0.1)
        Share of the rounds in which all blocks alternate alike.
    lr_a, lr_b : float (default: 1)
        Learning rates of A and B. A gain is an update's squared norm divided by its rate.
    lr_schedule, lr_schedule_a, lr_schedule_b : str
        How the learning rates of both, of A and of B change (see `fedlora_flwr.schedules`).
    **kwargs
        Those of `FedLoRA`.

    Raises
    ------
    InvalidValue
        An argument is out of range.

    Examples
    --------
    >>> from fedlora_flwr.layout import Layout
    >>> layout = Layout(("blocks.0.fc.lora_A.weight", "blocks.0.fc.lora_B.weight"))
    >>> strategy = ASLoRA(seed=1)
    >>> str(strategy.plan(1, layout))  # While B = 0 the gradient of A is zero.
    'B'
    """

    paper: ClassVar[tuple[str, ...]] = (
        "Adaptive Selection of LoRA Components in Privacy-Preserving Federated Learning",
        "2605.05769",
    )

    name: ClassVar[str] = "as-lora"
    settings: ClassVar[type] = ASLoRASection
    reads: ClassVar[tuple[str, ...]] = (
        "lr_a", "lr_b", "lr_schedule", "lr_schedule_a", "lr_schedule_b",
    )  # fmt: skip
    averages: ClassVar[bool] = True
    needs_each_upload: ClassVar[bool] = False

    curvature: str
    curvature_rounds: int
    selection: str
    groups: str
    temperature: float
    explore: float
    score_decay: float
    score_drift: float
    warm_up: float

    def __init__(
        self,
        *args: Any,
        lr_a: float = 1.0,
        lr_b: float = 1.0,
        lr_schedule: str = "constant",
        lr_schedule_a: str = "",
        lr_schedule_b: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.groups == "layer":
            self.blocks = self.blocks or ".+"
        self.rates = {A: lr_a, B: lr_b}
        self._schedules = {
            A: Schedule.parse(lr_schedule_a or lr_schedule),
            B: Schedule.parse(lr_schedule_b or lr_schedule),
        }

    def begin(self) -> None:
        """Start without scores."""
        super().begin()
        self.scores: list[Scores] = []
        """One for each group of blocks that share a choice."""
        self._choices: list[Choice] = []
        self._made: list[Choice] = []
        self._last: dict[str, tuple[int, Movement]] = {}

    def state_dict(self) -> dict[str, Any]:
        """Add the scores, each array's last movement, and the choices so far."""
        return {
            **super().state_dict(),
            "scores": [asdict(scores) for scores in self.scores],
            "last": {
                name: {"round": number, **asdict(moved)}
                for name, (number, moved) in self._last.items()
            },
            "made": [asdict(choice) for choice in self._made],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Also restore scores, movements and choices."""
        super().load_state_dict(state)
        self.scores = [Scores.of(**scores) for scores in state["scores"]]
        self._last = {
            name: (found["round"], Movement.of(found["mean"], found["square"], found["noise"]))
            for name, found in state["last"].items()
        }
        self._made = [Choice(**choice) for choice in state["made"]]

    def plan(self, server_round: int, layout: Layout) -> ComponentPlan:
        """Choose the blocks' modes.

        Raises
        ------
        InvalidValue
            A layer is in no named block.
        """
        layout.check_blocks()
        blocks = len(layout.blocks)
        count = 1 if self.groups == "tied" else blocks
        if len(self.scores) != count:
            self.scores = [Scores() for _ in range(count)]
        if self.selection == "fixed" or server_round <= math.floor(self.warm_up * self.num_rounds):
            self._choices = [Choice(B if server_round % 2 else A)] * count
        else:
            generator = np.random.default_rng(stream_seed(self.seed, "modes", server_round))
            draws = generator.random(count).tolist()
            self._choices = [
                self._choose(server_round, scores, draw)
                for scores, draw in zip(self.scores, draws, strict=True)
            ]
        modes = "".join(choice.mode for choice in self._choices)
        return ComponentPlan.uniform(modes * blocks if count < blocks else modes)

    def aggregate(
        self, server_round: int, current: Arrays, uploads: Sequence[Upload]
    ) -> dict[str, NDArray[np.floating]]:
        """Average the active factors, and score those alone."""
        arrays = super().aggregate(server_round, current, uploads)
        found = self._observe(server_round, current, uploads)
        self._made += self._choices
        if self.last_round is not None:
            self.last_round.details = self._details(server_round, found)
        return arrays

    def remarks(self) -> dict[str, str]:
        """Say whether the run's choices can be told from chance."""
        sentence = verdict([c.z for c in self._made if c.z is not None], self.score_decay)
        return {"choices": sentence} if sentence else {}

    def rate(self, factor: str, server_round: int) -> float:
        """Return a factor's learning rate in a round, times the local steps."""
        change = self._schedules[factor].factor(server_round, self.num_rounds)
        return self.rates[factor] * change * max(self.local_steps, 1)

    def _observe(
        self, server_round: int, current: Arrays, uploads: Sequence[Upload]
    ) -> list[Estimate | None]:
        """Score what trained; return each group's score of this round, if there is one."""
        names = [name for name in uploads[0].arrays if factor_of(name)]
        sums = uploads[0].sums or UpdateSums.of(
            current, [u.arrays for u in uploads], [u.weight for u in uploads]
        )
        moved = movements(sums, names)
        # Rounds with different rates can be compared by gradients, but not by updates.
        for name in names:
            rate = self.rate(str(factor_of(name)), server_round)
            moved[name] = moved[name].times(1 / rate if rate > _STILL else 0.0)
        index = Layout.of(current, self.blocks).block_index
        found: list[Estimate | None] = []
        for group, (scores, choice) in enumerate(zip(self.scores, self._choices, strict=True)):
            own = [n for n in names if len(self.scores) == 1 or index[n] == group]
            gain, bend = self._gain(own, moved), self._bend(server_round, own, moved)
            if gain is not None:
                scores.gains[choice.mode].add(gain, server_round, self.score_decay)
            if bend is not None:
                scores.bends[choice.mode].add(bend, server_round, self.score_decay)
            found.append(gain and self.rate(choice.mode, server_round) * gain)
        self._last.update({name: (server_round, moved[name]) for name in names})
        return found

    def _gain(self, names: Sequence[str], moved: dict[str, Movement]) -> Estimate | None:
        """Return by how much the loss fell along the clients' paths, over the rate."""
        total = Estimate()
        for name in names:
            now, (_, before) = moved[name], self._last.get(name, (0, None))
            if now.square is not None:
                total += now.square
            elif before is not None:
                # The noise cannot be estimated from one update, but from those of two rounds.
                total += across(before, now)
            else:
                return None
        return total

    def _bend(
        self, server_round: int, names: Sequence[str], moved: dict[str, Movement]
    ) -> Estimate | None:
        """Return what curvature took from the round before, where the same arrays trained."""
        if self.curvature == "none":
            return None
        total = Estimate()
        for name in names:
            when, before = self._last.get(name, (0, None))
            known = before is not None and before.square and moved[name].square
            if before is None or not known or when != server_round - 1:
                return None
            total += secant(before, moved[name], self.local_steps)
        return total

    def _before(self, server_round: int, scores: Scores) -> tuple[Estimate | None, Estimate | None]:
        first = self.num_rounds - self.curvature_rounds if self.curvature_rounds else 0
        curved = self.curvature != "none" and server_round > first
        a, b = scores.before(server_round, self.score_decay, curved)
        return a and self.rate(A, server_round) * a, b and self.rate(B, server_round) * b

    def _choose(self, server_round: int, scores: Scores, draw: float) -> Choice:
        a, b = self._before(server_round, scores)
        # B first also where neither has a score: while B = 0 the gradient of A is zero.
        if b is None:
            return Choice(B)
        if a is None:
            return Choice(A)
        # Training moves the gradients of what does not train, too.
        drift = self.score_drift * math.sqrt(scores.unseen(server_round))
        chance = chance_of_a(lead(a, b, drift), self.selection, self.temperature, self.explore)
        return Choice(A if draw < chance else B, lead(a, b), chance)

    def _details(self, server_round: int, found: list[Estimate | None]) -> dict[str, Any]:
        after = [self._before(server_round + 1, scores) for scores in self.scores]
        return {
            "scores": [None if gain is None else gain.value for gain in found],
            "score_errors": [None if gain is None else math.sqrt(gain.variance) for gain in found],
            "scores_A": [None if a is None else a.value for a, _ in after],
            "scores_B": [None if b is None else b.value for _, b in after],
            "z": [choice.z for choice in self._choices],
            "chance_A": [choice.chance for choice in self._choices],
        }
