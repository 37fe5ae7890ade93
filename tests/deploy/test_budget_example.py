"""The table of docs/deployment.md on several runs: what a device's ledger really admits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import BudgetExhausted
from fedlora_flwr.privacy.budget import Segment
from fedlora_flwr.privacy.calibration import calibrated_mechanism
from fedlora_flwr.privacy.ledger import Account, Ledger

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
SECTION = PAGE.split("### Several runs on one budget")[1].split("\n## ")[0]
ROWS = re.findall(
    r"^\| ([\d.]+) .*?\| ([\d.]+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", SECTION, re.M
)
RECORDS = 1_000


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"run-epsilon={row[0]}")
def test_the_ledger_admits_as_many_runs_as_the_page_says(
    row: tuple[str, ...], tmp_path: Path
) -> None:
    run_epsilon, *shown = row
    config = RunConfig(
        epsilon=4.0, delta=1e-4, ledger_scope="lifetime", run_epsilon=float(run_epsilon),
        num_rounds=20, local_steps=5, batch_size=32,
    )  # fmt: skip
    ledger, noises = Ledger(tmp_path / "ledger.sqlite"), set()
    spent: list[float] = []
    while len(spent) < 20:
        account = Account(
            "device-01", f"run-{len(spent)}", 4.0, 1e-4, "lifetime", config.run_epsilon
        )
        try:
            found = calibrated_mechanism(config, RECORDS, terms=ledger.terms(account))
            planned = Segment(found.noise_multiplier, found.sample_rate, config.planned_steps)
            ledger.record(account, 1, planned, planned)
        except BudgetExhausted:
            break
        noises.add(f"{found.noise_multiplier:.2f}")
        spent.append(ledger.summary(account).epsilon)
    (noise,) = noises
    assert shown == [noise, str(len(spent)), f"{spent[0]:.2f}", f"{spent[-1]:.2f}"]


def test_the_page_has_the_table() -> None:
    assert [row[0] for row in ROWS] == ["0", "2.0", "1.0"]
