"""The program of a device's SuperExec: Flower's own, which starts a process for each message."""

from __future__ import annotations

import sys

from fedlora_flwr.deploy.flower import SUPEREXEC, program


def main() -> None:
    """Be a SuperExec."""
    sys.argv = [SUPEREXEC, *sys.argv[1:], "--executor", "subprocess"]
    sys.exit(program(SUPEREXEC)())  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
