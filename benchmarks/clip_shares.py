"""A clip norm for each part against one joint clip with weights, at the same noise.

Both cut the same gradients of real records. What a part gets is its signal: the norm of the mean of
the clipped gradients over C, in units in which all coordinates of all parts have the same noise.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from torch import Tensor

from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.config.recipes import load_recipe
from fedlora_flwr.layout import part_of
from fedlora_flwr.plan import HEAD, ComponentPlan
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.terminal import Table, show

SHARES = (0.3, 0.5, 0.7, 0.9)
CLIPPED = (1.0, 0.8)
"""Share of the records that the joint clip with weights of 1 cuts."""
_CLIENTS, _RECORDS, _STEPS = 10, 60, 60


@dataclass(frozen=True)
class Parts:
    """Gradients by record of the adapters and of the head, shapes (n, D) and (n, D')."""

    adapters: Tensor
    head: Tensor

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        """Norms by record, each of shape (n,)."""
        return self.adapters.norm(dim=1), self.head.norm(dim=1)


def joint(parts: Parts, weight: float, clip_norm: float) -> Parts:
    """Clip both parts together to C, with a weight of the head."""
    first, second = parts.lengths
    factor = (clip_norm / (first.square() + (weight * second).square()).sqrt()).clamp(max=1)
    return Parts(factor[:, None] * parts.adapters, (weight * factor)[:, None] * parts.head)


def apart(parts: Parts, share: float, weight: float, clip_norm: float) -> Parts:
    """Clip the adapters to √α C and the weighted head to √(1 - α) C: the same noise as `joint`."""
    first, second = parts.lengths
    limits = math.sqrt(share) * clip_norm, math.sqrt(1 - share) * clip_norm
    one, two = (limits[0] / first).clamp(max=1), (limits[1] / (weight * second)).clamp(max=1)
    return Parts(one[:, None] * parts.adapters, (weight * two)[:, None] * parts.head)


def signals(clipped: Parts, clip_norm: float) -> tuple[float, float]:
    """Return the norm of the mean of what is left of both parts, over C."""
    means = clipped.adapters.mean(dim=0), clipped.head.mean(dim=0)
    return float(means[0].norm()) / clip_norm, float(means[1].norm()) / clip_norm


def matched(parts: Parts, head: float, clip_norm: float) -> float:
    """Return the weight at which the head's signal under the joint clip is as given."""
    low, high = 1e-4, 1e4
    for _ in range(60):
        middle = math.sqrt(low * high)
        below = signals(joint(parts, middle, clip_norm), clip_norm)[1] < head
        low, high = (middle, high) if below else (low, middle)
    return low


def states() -> Iterator[tuple[str, Parts]]:
    """Yield gradients of the digits before training and later, by the factor that trains."""
    config = replace(load_recipe("digits"), local_steps=_STEPS, device="cpu")
    trainer = LocalTrainer.build(config)
    clients = [trainer.task.client_records(client, _CLIENTS) for client in range(_CLIENTS)]

    def of(factor: str) -> Parts:
        names = [n for n in trainer.adapted.parameters if part_of(n) in (factor, HEAD)]
        rows: dict[bool, list[Tensor]] = {True: [], False: []}
        for records in clients:
            some = torch.arange(min(len(records), _RECORDS))
            found = trainer.engine.gradients_by_record(records, some, names)
            for is_head, kept in rows.items():
                own = [
                    found[n].flatten(1).double() for n in names if (part_of(n) == HEAD) is is_head
                ]
                kept.append(torch.cat(own, dim=1))
        return Parts(torch.cat(rows[False]), torch.cat(rows[True]))

    yield "start, B", of("B")
    arrays = dict(trainer.start)
    for client, records in enumerate(clients[:4]):
        mechanism = Mechanism(0.0, config.clip_norm, config.batch_size, len(records))
        plan = ComponentPlan.parse("*")
        arrays |= trainer.train(arrays, plan, records, mechanism, ("shares", client)).arrays
    trainer.load(arrays)
    for factor in ("A", "B"):
        yield f"later, {factor}", of(factor)


def main(argv: Sequence[str] | None = None) -> None:
    """Compare a clip norm for each part with one joint clip and weights, on the digits."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.clip_shares", description=main.__doc__
    )
    parser.parse_args(argv)
    columns = (
        "gradients",
        "records cut",
        "α",
        "head, both",
        "adapters, by part",
        "joint",
        "weight",
    )
    rows = []
    for name, parts in states():
        first, second = parts.lengths
        whole = (first.square() + second.square()).sqrt()
        for cut in CLIPPED:
            clip_norm = float(whole.quantile(1 - cut)) if cut < 1 else float(whole.min()) * 1e-3
            for share in SHARES:
                adapters, head = signals(apart(parts, share, 1.0, clip_norm), clip_norm)
                weight = matched(parts, head, clip_norm)
                other, _ = signals(joint(parts, weight, clip_norm), clip_norm)
                figures = f"{head:.3f}", f"{adapters:.3f}", f"{other:.3f}", f"{weight:.2f}"
                rows.append((name, f"{cut:.0%}", f"{share:.1f}", *figures))
    show(Console(), Table(columns, rows, "<>>>>>>"))


if __name__ == "__main__":
    main()
