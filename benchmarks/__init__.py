"""Measurements behind the claims about speed, memory and learning.

`python -m benchmarks` runs those with a bar. `aggregation`, `as_lora_scores` and `learning` are
commands of their own, `python -m benchmarks.NAME`; each writes a file only where ``--output`` names
one. `clients`, `engine`, `started` and `workers` are also what the benchmarks start in processes of
their own; the other modules are libraries. Nothing of this is in the installed package.
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The repository: a process that imports this package has to start here."""
