"""Measurements behind the claims about speed, memory and learning.

`python -m benchmarks` runs those with a bar. Each other module is a command of its own,
`python -m benchmarks.NAME`. Nothing of this is in the installed package.
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The repository: a process that imports this package has to start here."""
