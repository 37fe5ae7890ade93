"""A picture of an audit: what the attacker reached, and what the claim allows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import ndtr, ndtri  # type: ignore[import-untyped]

from fedlora_flwr.audit.bounds import mu_of_epsilon
from fedlora_flwr.audit.record import AuditRecord
from fedlora_flwr.plots.figures import MODES, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_audit(record: AuditRecord, path: Path) -> None:
    """Draw the attacker's trade-off curve beside those of the claim.

    Parameters
    ----------
    record : AuditRecord
        The record.
    path : Path
        The PNG file, written atomically.
    """
    save(audit_figure(record), path)


def audit_figure(record: AuditRecord) -> Figure:
    """Make the picture of `plot_audit`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 6), layout="constrained")
    axes = figure.subplots()
    alarms = np.linspace(0, 1, 501)
    epsilon, delta = record.claim, record.delta
    least = np.maximum(
        np.maximum(0, 1 - delta - np.exp(epsilon) * alarms),
        np.exp(-epsilon) * (1 - delta - alarms),
    )
    gaussian = ndtr(ndtri(1 - alarms) - mu_of_epsilon(epsilon, delta))
    axes.fill_between(alarms, 0, least, color="#D9D9D9", label=f"excluded by ε = {epsilon:.2f}")
    axes.plot(alarms, gaussian, "--", color="black", label="Gaussian mechanism of that ε")
    found = np.array(record.curve)
    axes.plot(found[:, 0], found[:, 1], color=MODES["B"], label="the attacker")
    axes.plot([0, 1], [1, 0], ":", color="#777777", label="guesses without a look")
    axes.set_xlabel("False alarms: canary absent, attacker says present")
    axes.set_ylabel("Misses: canary present, attacker says absent")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    axes.legend(loc="upper right", frameon=False)
    settings, counts = record.settings, record.counts
    trials = f"{counts.absent + counts.present:,} canaries, {counts.runs_in_words}"
    axes.set_title(
        f"{settings['task']}, {settings['strategy']}, {record.mode}: {trials}\n"
        f"ε ≥ {record.best:.2f} of {epsilon:.2f} at {100 * record.confidence:.4g} % confidence",
        fontsize=10,
    )
    return figure
