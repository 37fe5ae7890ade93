"""The README's commands, and a shell in which no environment is activated."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent
# As they stand above `flwr run`: tests/simulations/test_flwr_run.py runs these lines.
FLOWER = re.findall(r"^    (?:export|flwr) .*$", README, re.M)


def unactivated(**more: str) -> dict[str, str]:
    """Return an environment that knows nothing of this project's programs."""
    kept = ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "PYTHONPATH", "OMP_NUM_THREADS")
    base = {name: os.environ[name] for name in kept if name in os.environ}
    return {**base, "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", **more}
