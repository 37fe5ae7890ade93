"""Measurements behind the claims about speed, memory and learning.

`python -m benchmarks` runs those with a bar. `accounting`, `aggregation`, `as_lora_scores`,
`learning`, `mechanisms` and `randomness` are separate commands, `python -m benchmarks.NAME`; each
writes files only if ``--output`` names a place.
The benchmarks start `clients`, `engine`, `started` and `workers` as separate processes. All other
modules are libraries. The installed package contains none of this.
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The repository. A process that imports this package has to start in this folder."""
