"""The table of docs/deployment.md on several runs: what a device's ledger really admits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import BudgetExhausted
from fedlora_flwr.privacy.budget import Segment
from fedlora_flwr.privacy.calibration import calibrated_mechanism
from fedlora_flwr.privacy.foreseen import foresee
from fedlora_flwr.privacy.ledger import LAPSE, Account, Ledger

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


def test_what_the_page_says_of_a_short_first_run_is_so() -> None:
    """A Rényi filter counts more for it than its share, and the page warns of that."""
    said = r"with ([\d,]+) records has spent ([\d.]+) of 4 after\s+its first run, and (\d) more"
    ((records, spent, more),) = re.findall(said, SECTION)
    config = RunConfig(
        epsilon=4.0, delta=1e-4, ledger_scope="lifetime", run_epsilon=2.0,
        num_rounds=2, local_steps=2, batch_size=8,
    )  # fmt: skip
    found = calibrated_mechanism(config, int(records.replace(",", "")))
    planned = Segment(found.noise_multiplier, found.sample_rate, config.planned_steps)
    account = Account("device-01", "", 4.0, 1e-4, "lifetime", 2.0)
    cost = foresee(account, [], planned, LAPSE)
    assert (spent, more) == (f"{cost.after:.2f}", str(cost.more))


def test_the_page_has_the_table() -> None:
    assert [row[0] for row in ROWS] == ["0", "2.0", "1.0"]
