"""Put on a device's path as ``sitecustomize``: writes down each address that a process turns to.

It sees Python's own sockets. `remote_ends` asks the kernel, which sees those of all libraries.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

FILE = "FEDLORA_TEST_ADDRESSES"
_EVENTS = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo")
_ESTABLISHED, _CLOSED = 1, 7


def watch(file: str) -> None:
    """Append the address of each connection and datagram of this process to a file."""
    kept = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if event in _EVENTS:
            # `getaddrinfo` has host and port; the others have a socket and an address.
            address = args[:2] if event == "socket.getaddrinfo" else args[1]
            os.write(kept, f"{event} {address!r}\n".encode())

    sys.addaudithook(hear)


def group_of(leader: int) -> list[int]:
    """Return the processes of a session (Linux)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader:
            found.append(int(process.name))
    return found


def remote_ends(process: int) -> set[tuple[str, int]]:
    """Return the other ends of a process's TCP and UDP sockets, as the kernel has them (Linux)."""
    own: set[str] = set()
    found: set[tuple[str, int]] = set()
    try:
        for entry in Path(f"/proc/{process}/fd").iterdir():
            target = str(entry.readlink()) if entry.is_symlink() else ""
            own.add(target.removeprefix("socket:[").removesuffix("]"))
    except OSError:
        return found
    for kind in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]:
            fields = line.split()
            host, port = fields[2].split(":")
            if fields[9] in own and int(port, 16):
                found.add((host, int(port, 16)))
    return found


if FILE in os.environ:
    watch(os.environ[FILE])
