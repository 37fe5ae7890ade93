from __future__ import annotations

import subprocess
import sys

CHILD = "from fedlora_flwr.environment import peak_memory; print(peak_memory())"
PARENT = (
    "import subprocess, sys\n"
    "held = b'1' * 600_000_000\n"
    f"subprocess.run([sys.executable, '-c', {CHILD!r}], check=True, close_fds=False)\n"
    f"{CHILD}"
)


def test_a_process_peak_is_its_own_and_not_its_parents() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PARENT], capture_output=True, text=True, check=True
    )
    child, parent = map(int, sorted(done.stdout.split(), key=int))
    assert parent > 600_000_000
    assert 1_000_000 < child < 300_000_000
