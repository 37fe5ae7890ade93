"""Facts of a run, as its files have them, and how tests read a report."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedlora_flwr.config import RunConfig
from fedlora_flwr.report.facts import RunFacts

BLOCKS = ("layer.0", "layer.1", "layer.2")


def facts(
    rounds: int = 4, clients: int = 3, config: RunConfig | None = None, **others: Any
) -> RunFacts:
    """Return a run of so many rounds and clients, with a summary, a split and an audit."""
    config = config or RunConfig(strategy="as-lora", num_rounds=rounds, epsilon=8.0)
    rows: list[dict[str, Any]] = [{"round": 0, "loss": 2.0, "accuracy": 0.125, "seconds": 0.5}]
    told = []
    for n in range(1, rounds + 1):
        rows.append(row(n, rounds))
        told += [
            {
                "round": n, "client": f"device-{c:04}", "epsilon": 8 * n / rounds / (c + 1),
                "epsilon-budget": 8.0, "delta": 1e-3, "seconds": 1.5,
            }
            for c in range(clients)
        ]  # fmt: skip
    given = {
        "summary": summary(rows, config, clients),
        "split": {
            "partitioner": "dirichlet",
            "clients": [
                {"client": c, "by_class": {"cat": 7 + c, "dog": 0}} for c in range(clients)
            ],
        },
        "audit": audit(),
    }
    return RunFacts("a-run", config, rounds=rows, clients=told, **{**given, **others})


def row(number: int, rounds: int) -> dict[str, Any]:
    return {
        "round": number, "loss": 2 - number / rounds, "accuracy": 0.125 + 0.5 * number / rounds,
        "plan": "ABA" if number % 2 else "BB*", "epsilon_max": 8 * number / rounds,
        "failures": [], "declined": [], "suspects": [], "bytes_down": 2000, "bytes_up": 1500,
        "bytes_plain": 6000, "seconds": 2.0, "agreement": {"A": 0.1, "head": 0.5},
        "mean_error": 0.25,
    }  # fmt: skip


def summary(rows: list[dict[str, Any]], config: RunConfig, clients: int) -> dict[str, Any]:
    return {
        "status": "completed", "metric": "accuracy", "num_clients": clients,
        "initial_accuracy": rows[0]["accuracy"], "final_accuracy": rows[-1]["accuracy"],
        "best": {"round": 3, "chosen_by": "accuracy", "metrics": {"accuracy": 0.5}},
        "epsilon_max": 8.0, "epsilon_budget": 8.0, "delta": config.delta, "accountant": "prv",
        "bytes_up": 1500 * (len(rows) - 1), "bytes_down": 2000 * (len(rows) - 1), "seconds": 9.0,
        "blocks": list(BLOCKS), "remarks": {"choices": "can be told from chance"},
        "versions": {"torch": "2.14.1"},
    }  # fmt: skip


def audit() -> dict[str, Any]:
    return {
        "claim": 8.0, "delta": 1e-3, "confidence": 0.95, "verdict": "too weak to say",
        "attack": "the server, which sees each upload of 5 steps",
        "bounds": [{"epsilon": 1.5, "statistic": "counts", "assumes": ""}],
        "curve": [[0.0, 1.0], [0.25, 0.5], [1.0, 0.0]],
    }  # fmt: skip


def seeds(accuracies: Mapping[int, float], **settings: Any) -> list[RunFacts]:
    """Return runs that end at these figures, by seed."""
    found = []
    for seed, value in accuracies.items():
        config = RunConfig(seed=seed, num_rounds=4, **settings)
        run = facts(config=config)
        rows = [{**one, "accuracy": value * one["round"] / 4} for one in run.rounds]
        ended = {**run.summary, "final_accuracy": value}
        found.append(replace(run, name=f"seed-{seed}", rounds=rows, summary=ended))
    return found


def parsed(page: str) -> ET.Element:
    """Return the document; a browser would forgive what XML does not."""
    doctype, document = page.split("\n", 1)
    assert doctype == "<!DOCTYPE html>"
    return ET.fromstring(document)


def texts(found: ET.Element) -> str:
    return " ".join("".join(found.itertext()).split())
