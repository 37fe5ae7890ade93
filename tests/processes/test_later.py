"""A module that stands back until it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedlora_flwr.processes.later import later

IMPORTED = """
import sys
from fedlora_flwr.processes.later import later

with later("flwr_datasets.visualization", "wandb", "no_such_module"):
    {library}
print([name for name in ("matplotlib", "seaborn", "wandb") if name in sys.modules])
{use}
"""


def printed(library: str, use: str = "") -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED.format(library=library, use=use)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_library_is_imported_without_what_it_seldom_uses() -> None:
    use = """
import flwr_datasets
print(flwr_datasets.visualization.plot_label_distributions.__name__)
print("matplotlib" in sys.modules)
"""
    assert printed("import flwr_datasets.partitioner", use) == [
        "[]",
        "plot_label_distributions",
        "True",
    ]


def test_timm_leaves_a_tracker_alone_until_it_is_used() -> None:
    pytest.importorskip("wandb")
    use = """
from timm.utils import summary
import wandb
print(summary.wandb.init is wandb.init)
"""
    assert printed("import timm", use) == ["[]", "True"]


def test_a_module_that_is_there_stays_what_it_is() -> None:
    before = sys.modules["subprocess"]
    with later("subprocess"):
        assert sys.modules["subprocess"] is before
    assert sys.modules["subprocess"] is before
