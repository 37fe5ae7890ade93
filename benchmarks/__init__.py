"""Measurements behind the claims about speed, memory and learning.

`python -m benchmarks` runs those with a bar. Other modules that end with a call of `main` are
separate commands, `python -m benchmarks.NAME -h`. The benchmarks start `clients`, `engine`,
`started` and `workers` as separate processes. The rest are libraries. The installed
package contains none of this.
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The repository. A process that imports this package has to start in this folder."""
