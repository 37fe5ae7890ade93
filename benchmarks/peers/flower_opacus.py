"""What an attack finds of the ε that Flower's Opacus example reports.

Fetch the example's folder (``examples/opacus`` of https://github.com/adap/flower), and run
``python -m benchmarks.peers.flower_opacus FOLDER``. Its own client app answers. Only its records
are replaced, because they would be downloaded.

The attacker is the server. It sends a model that is sure of class 0, so that the gradient of a
record with that label is zero: an absent canary has it, and a present one has label 1. In each
round the client makes a new accountant, so the ε that it reports is that of one round.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from torch.utils.data import DataLoader

from benchmarks.figures import write_content
from fedlora_flwr.audit.bounds import bounds_of
from fedlora_flwr.audit.trials import tosses
from fedlora_flwr.simulations.local_grid import LocalGrid

RESULT = Path(__file__).parents[1] / "results" / "audit" / "flower-opacus.json"
DELTA, CLIP_NORM, RECORDS, CONFIDENCE = 1e-5, 1.0, 8, 0.95
SURE = 60.0
"""Logit of class 0 in the server's model."""


class Peer:
    """The example's client, with records of ours.

    Parameters
    ----------
    folder : Path
        The example's folder, which holds the package ``opacus_fl``.
    """

    def __init__(self, folder: Path) -> None:
        sys.path.insert(0, str(folder))
        self._app: Any = importlib.import_module("opacus_fl.client_app")
        logging.getLogger("opacus").setLevel(logging.ERROR)
        torch.manual_seed(0)
        self._net: torch.nn.Module = self._app.Net()
        last = list(self._net.parameters())[-1]
        with torch.no_grad():
            last[0] = SURE
        drawn = torch.Generator().manual_seed(0)
        self._images = torch.randn((RECORDS, 3, 32, 32), generator=drawn)

    def play(self, rounds: int, *, present: bool) -> tuple[float, float]:
        """Run so many rounds; return the attacker's score, and the largest ε that was reported."""
        labels = [int(present)] + [0] * (RECORDS - 1)
        rows = [{"img": x, "label": y} for x, y in zip(self._images, labels, strict=True)]
        loader: DataLoader[Any] = DataLoader(rows, batch_size=32)  # type: ignore[arg-type]
        self._app.load_data = lambda **_: (loader, loader)
        arrays, score, reported = ArrayRecord(self._net.state_dict()), 0.0, 0.0
        settings = {"target-delta": DELTA, "max-grad-norm": CLIP_NORM}
        grid = LocalGrid(self._app.app, 1, settings)
        with grid.running():
            for _ in range(rounds):
                (node,) = grid.get_node_ids()
                asked = Message(RecordDict({"arrays": arrays}), node, "train")
                (reply,) = grid.send_and_receive([asked])
                content = reply.content
                reported = max(reported, float(content["metrics"]["epsilon"]))  # type: ignore[arg-type]
                score += self._score(arrays, content.array_records["arrays"])
                arrays = content.array_records["arrays"]
        return score, reported

    def _score(self, before: ArrayRecord, after: ArrayRecord) -> float:
        """Return the upload's part along the canary's gradient."""
        start = before.to_torch_state_dict()
        self._net.load_state_dict(start)
        loss = torch.nn.functional.cross_entropy(self._net(self._images[:1]), torch.tensor([1]))
        found = torch.autograd.grad(loss, list(self._net.parameters()))
        gone = after.to_torch_state_dict()
        parts = zip(self._net.named_parameters(), found, strict=True)
        return float(sum(((start[n] - gone[n]) * g).sum() for (n, _), g in parts))


def attacked(peer: Peer, rounds: int, trials: int) -> dict[str, Any]:
    """Return what so many runs of so many rounds show."""
    coins = tosses(trials)
    scores: dict[bool, list[float]] = {False: [], True: []}
    reported = 0.0
    for coin in coins:
        score, said = peer.play(rounds, present=coin)
        scores[coin].append(score)
        reported = max(reported, said)
    bounds = bounds_of(np.array(scores[False]), np.array(scores[True]), DELTA, CONFIDENCE)
    return {
        "rounds": rounds, "trials": len(coins), "reported": round(reported, 3),
        "bounds": {bound.statistic: round(bound.epsilon, 3) for bound in bounds},
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Attack runs of one round and of more, print what is found, and write it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.flower_opacus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="the example's folder")
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--trials", type=int, default=600)
    parser.add_argument("--output", type=Path, default=RESULT)
    given = parser.parse_args(arguments)
    peer, rows = Peer(given.folder), []
    for rounds in given.rounds:
        rows.append(attacked(peer, rounds, given.trials))
        print(rows[-1], file=sys.stderr, flush=True)
    command = "python -m benchmarks.peers.flower_opacus"
    write_content(given.output, command, {"rows": rows})


if __name__ == "__main__":
    main()
