"""Fits, on our own runs, how well the noise that `fedlora plan` shows tells which runs learn.

    python -m benchmarks.learning --output benchmarks/results

It reads the reported rows of finished comparisons below ``benchmarks/results``, calculates each
run's noise, and prints the table and the fits. ``--output`` names a folder for ``learning.csv`` and
``learning.json``. Clients of digits have the split of seed 1. Clients of other data sets all get
the mean number of records, since those records are not in the repository.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedlora_flwr.config import RunConfig, parse_overrides
from fedlora_flwr.forecast.forecast import skeleton
from fedlora_flwr.layout import Layout, factor_of
from fedlora_flwr.plan import A, B
from fedlora_flwr.privacy.calibration import calibrated_mechanism
from fedlora_flwr.server.noise import noise_to_signal, noisy_coordinates
from fedlora_flwr.server.strategy import build_strategy
from fedlora_flwr.tasks.registry import build_task

RESULTS = Path(__file__).parent / "results"
# A run gains if it ends this far above its start, and it learns if it keeps at least this share of
# what the same method gains without privacy.
GAINED, KEPT = 0.02, 0.5
# Files of rows by folder, and what they have changed in the folder's settings.
FILES = {
    "digits": (("rows.csv", ""), ("options.csv", ""), ("noise.csv", "")),
    "cifar10-small-swin": (("rows.csv", ""),),
    "sst2-minilm": (("rows.csv", ""), ("rows-56-rounds.csv", "num-rounds=56")),
}
RECORDS = {"cifar10-small-swin": 50_000, "sst2-minilm": 67_343}
# One layer that stands for all: numbers of B and A, then the head's (see the rows' bytes).
NUMBERS = {"cifar10-small-swin": (43_008, 21_504, 3_850), "sst2-minilm": (32_256, 32_256, 770)}
# These measure clients' own models, which have no common start to gain from.
LEFT_OUT = ("fedsa-lora", "mr-mtl")


def table() -> pd.DataFrame:
    """Return one row per setting: its noise, and the share of the gain that it keeps."""
    rows = pd.DataFrame(_settings())
    plain = rows[np.isinf(rows["epsilon"])]
    rows["plain"] = [_without_privacy(row, plain) for _, row in rows.iterrows()]
    rows = rows[np.isfinite(rows["epsilon"])].copy()
    rows["kept"] = (rows["final"] - rows["initial"]) / (rows["plain"] - rows["initial"])
    rows["gains"] = rows["final"] - rows["initial"] >= GAINED
    rows["learns"] = rows["kept"] >= KEPT
    rounded: pd.DataFrame = rows.round(4)
    return rounded


def fit(figures: NDArray[np.float64], good: NDArray[np.bool_]) -> float:
    """Return the threshold below which runs are good, with the fewest wrong verdicts."""
    order = np.sort(figures)
    # Thresholds may also be below or above all runs, as some groups have only good runs.
    middles = np.concatenate(([0.0], np.sqrt(order[1:] * order[:-1]), [np.inf]))
    wrong = [int(((figures < limit) != good).sum()) for limit in middles]
    best = [limit for limit, count in zip(middles, wrong, strict=True) if count == min(wrong)]
    return float(best[len(best) // 2])


def assess(rows: pd.DataFrame, figure: str, outcome: str) -> dict[str, Any]:
    """Fit on all rows. Judge each row by a fit without its group, so that none judges itself."""
    figures, good = rows[figure].to_numpy(float), rows[outcome].to_numpy(bool)
    wrong = {}
    for name, groups in (("row", np.arange(len(rows))), ("strategy", rows["strategy"]),
                         ("epsilon", rows["epsilon"]), ("data", rows["data"])):  # fmt: skip
        groups = np.asarray(groups)
        verdicts = np.empty(len(rows), bool)
        for group in np.unique(groups):
            out = groups == group
            verdicts[out] = figures[out] < fit(figures[~out], good[~out])
        wrong[f"without its {name}"] = int((verdicts != good).sum())
    limit = fit(figures, good)
    return {
        "threshold": round(limit, 3),
        "wrong": int(((figures < limit) != good).sum()),
        "wrong_cross_validated": wrong,
        f"largest_that_{outcome}": float(figures[good].max()),
        "smallest_that_does_not": float(figures[~good].min()),
    }


def _settings() -> Iterator[dict[str, Any]]:
    """Yield data set, method, ε, noise and accuracies of all runs."""
    for data, files in FILES.items():
        shared = json.loads((RESULTS / data / "settings.json").read_text(encoding="utf-8"))
        known = {key: value for key, value in shared.items() if key in RunConfig().items()}
        for file, changed in files:
            frame = pd.read_csv(RESULTS / data / file)
            frame = frame[(frame["phase"] == "report") & ~frame["strategy"].isin(LEFT_OUT)]
            frame["option"] = frame["option"].fillna("") if "option" in frame else changed
            groups = frame.groupby(["strategy", "epsilon", "option"], sort=False)
            for key, group in groups:
                strategy, epsilon, option = (str(part) for part in cast(Sequence[object], key))
                own = {"strategy": strategy, "epsilon": float(epsilon), "seed": 1}
                given = parse_overrides(option.split()) if option else {}
                config = RunConfig.of(known, own, given)
                yield {
                    "data": data, "file": file, "strategy": strategy, "epsilon": float(epsilon),
                    "option": option, "rounds": config.num_rounds, "runs": len(group),
                    **_noise(data, config),
                    "initial": group["initial"].mean(), "final": group["final"].mean(),
                }  # fmt: skip


def _noise(data: str, config: RunConfig) -> dict[str, float]:
    """Return the noise of one round and of a whole run, relative to the largest possible signal."""
    if not config.private:
        return {"round_noise": math.nan, "run_noise": math.nan}
    shapes, sizes = _shapes(data, config), _sizes(data, config)
    strategy, layout = build_strategy(config), Layout.of(shapes, config.blocks)
    strategy.num_rounds = config.num_rounds
    plans = [strategy.plan(number, layout) for number in (1, 2)]
    found = noisy_coordinates(plans, layout, shapes, config.local_steps, config.filter)
    ratio = noise_to_signal(config, [calibrated_mechanism(config, size) for size in sizes], found)
    assert ratio is not None
    return {"round_noise": ratio, "run_noise": ratio / math.sqrt(config.num_rounds)}


def _shapes(data: str, config: RunConfig) -> dict[str, tuple[int, ...]]:
    if data in NUMBERS:
        b, a, head = NUMBERS[data]
        layer = "layers.0.blocks.0.fc"
        sizes = {f"{layer}.lora_B.weight": b, f"{layer}.lora_A.weight": a, "head": head}
        return {
            name: {A: (1, size), B: (size, 1)}.get(factor_of(name) or "", (size,))
            for name, size in sizes.items()
        }
    model = skeleton(config, build_task(config.task, config))
    return {name: tuple(parameter.shape) for name, parameter in model.parameters.items()}


def _sizes(data: str, config: RunConfig) -> list[int]:
    clients = config.num_clients
    if data in RECORDS:
        return [RECORDS[data] // clients] * clients
    task = build_task(config.task, config)
    return [len(task.client_records(client, clients)) for client in range(clients)]


def _without_privacy(row: pd.Series[Any], plain: pd.DataFrame) -> float:
    """Return what the same method reaches without noise, with the same options if that was run."""
    same = plain[(plain["data"] == row["data"]) & (plain["strategy"] == row["strategy"])]
    for file, option in ((row["file"], row["option"]), (row["file"], ""), ("rows.csv", "")):
        found = same[(same["file"] == file) & (same["option"] == option)]
        if len(found):
            return float(found["final"].iloc[0])
    raise ValueError(f"no run without privacy for {row}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table and the fits, and write them if a folder is named."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, help="folder for learning.csv and learning.json")
    folder: Path | None = parser.parse_args(arguments).output
    rows = table()
    found = {
        "rows": len(rows),
        "gained_at_least": GAINED,
        "kept_at_least": KEPT,
        **{
            outcome: {
                "rows": int(rows[outcome].sum()),
                **{name: assess(rows, name, outcome) for name in ("round_noise", "run_noise")},
            }
            for outcome in ("gains", "learns")
        },
    }
    text = json.dumps(found, indent=2) + "\n"
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        rows.to_csv(folder / "learning.csv", index=False)
        (folder / "learning.json").write_text(text, encoding="utf-8")
    print(rows.to_string(index=False), text, sep="\n")


if __name__ == "__main__":
    main()
