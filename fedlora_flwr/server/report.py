"""The report of a run, ``report.html``, from the files of its folder."""

from __future__ import annotations

import json
from logging import WARNING
from pathlib import Path

from flwr.common.logger import log

from fedlora_flwr.config.recipes import load_recipe
from fedlora_flwr.files import replace_file
from fedlora_flwr.report.facts import RunFacts
from fedlora_flwr.report.page import run_report
from fedlora_flwr.server.run_dir import AUDIT, REPORT, SAMPLES, SPLIT, RunDirectory


def facts_of(run_dir: RunDirectory) -> RunFacts:
    """Read what a run has left in its folder.

    Parameters
    ----------
    run_dir : RunDirectory
        The folder of a run that has begun.

    Raises
    ------
    InvalidValue
        Its ``config.toml`` cannot be read.
    """
    path = run_dir.path
    parts = {
        name: json.loads(file.read_text("utf-8")) if (file := path / found).is_file() else {}
        for name, found in (("split", SPLIT), ("audit", AUDIT), ("samples", SAMPLES))
    }
    return RunFacts(
        name=path.resolve().name,
        config=load_recipe(str(path / "config.toml")),
        summary=run_dir.summary() or {},
        rounds=[dict(row) for row in run_dir.rounds()],
        clients=run_dir.rows("clients"),
        **parts,
    )


def write_report(run_dir: RunDirectory) -> Path:
    """Write ``report.html`` into a run's folder, atomically; return the file.

    Parameters
    ----------
    run_dir : RunDirectory
        The folder of a run that has begun.

    Raises
    ------
    InvalidValue
        Its ``config.toml`` cannot be read.
    FileTrouble
        The file cannot be written.
    """
    target = run_dir.path / REPORT
    replace_file(target, run_report(facts_of(run_dir)).encode())
    return target


def try_report(run_dir: RunDirectory) -> None:
    """Write ``report.html``. A report that fails is logged, and does not take a result away."""
    try:
        write_report(run_dir)
    except Exception as error:
        log(WARNING, "%s could not be written.", REPORT, exc_info=error)
