"""Put on a device's path as ``sitecustomize``: writes down each address that a process turns to.

It sees Python's own sockets. `tests.processes.processes.remote_ends` asks the kernel, which sees
those of all libraries.
"""

from __future__ import annotations

import os
import sys
from typing import Any

FILE = "FEDLORA_TEST_ADDRESSES"
_EVENTS = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo")


def watch(file: str) -> None:
    """Append the address of each connection and datagram of this process to a file."""
    kept = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if event in _EVENTS:
            # `getaddrinfo` has host and port; the others have a socket and an address.
            address = args[:2] if event == "socket.getaddrinfo" else args[1]
            os.write(kept, f"{event} {address!r}\n".encode())

    sys.addaudithook(hear)


if FILE in os.environ:
    watch(os.environ[FILE])
