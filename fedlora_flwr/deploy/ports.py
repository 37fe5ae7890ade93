"""Whether the port of a fleet's program is free, and who has it if it is not.

Flower shows a traceback of some twenty lines where its port is taken. Here it is one sentence,
before Flower starts.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from fedlora_flwr.errors import CannotStart
from fedlora_flwr.operating_system import lock_held, try_lock

NODE_PORT = "FEDLORA_NODE_PORT"
"""Environment variable that gives a device's start script another port."""

_LOOPBACK = "127.0.0.1"
_RUNNING = ".running"
_PATIENCE = 3.0  # seconds
_VARIABLE = re.compile(r"\$\{(\w+):-(\d+)\}")


class PortTaken(CannotStart):
    """Another program listens on the port that this one needs."""

    def __str__(self) -> str:
        said = super().__str__()
        return f"{said[:1].upper()}{said[1:]}"


def asked(arguments: Sequence[str], env: Mapping[str, str]) -> tuple[str, int] | None:
    """Return the host and port that arguments of Flower's programs name.

    Parameters
    ----------
    arguments : sequence of str
        The arguments, as a shell passes them or as a start script has them.
    env : mapping of str to str
        Environment for ``${NAME:-NUMBER}`` in a script.

    Returns
    -------
    tuple[str, int] or None
        ``None`` where they name no port, or something that is not a number.
    """
    given = {"--host": _LOOPBACK, "--port": ""}
    for name, value in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, joined = name.partition("=")
        if option in given:
            given[option] = joined if equals else value
    found = _VARIABLE.sub(lambda match: env.get(match[1]) or match[2], given["--port"])
    return (given["--host"], int(found)) if found.isdecimal() else None


def trouble(host: str, port: int) -> str:
    """Say why nothing can listen on a port; an empty text where it is free."""
    try:
        with socket.socket() as listener:
            # As Flower does: connections that ended a short while ago do not matter.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
    except (OSError, OverflowError) as error:
        return getattr(error, "strerror", None) or str(error)
    return ""


def require_free(arguments: Sequence[str], fix: str) -> None:
    """Refuse to start where the port that arguments name is taken.

    Parameters
    ----------
    arguments : sequence of str
        The arguments of Flower's program.
    fix : str
        What to do.

    Raises
    ------
    PortTaken
        Nothing can listen on it.
    """
    place = asked(arguments, os.environ)
    if place and (why := trouble(*place)):
        raise PortTaken(f"port {place[1]} of this machine cannot be used ({why})", fix)


def serves(authority: Path, host: str, port: int) -> bool:
    """Tell whether a server of a fleet listens on a port of this machine.

    Parameters
    ----------
    authority : Path
        The certificate of the fleet's CA. Only a server with a certificate that it signed counts.
    host : str
        The name in the server's certificate.
    port : int
        The port.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with suppress(OSError):  # It is refused, silent, or speaks something else.
        context.load_verify_locations(authority)
        with (
            socket.create_connection((_LOOPBACK, port), timeout=_PATIENCE) as link,
            context.wrap_socket(link, server_hostname=host),
        ):
            return True
    return False


def claim(folder: Path) -> bool:
    """Note, until this process ends, that a device's SuperNode runs; False if one does already.

    The note stays when this process becomes another program. It is not passed on to children.

    Parameters
    ----------
    folder : Path
        A folder of the device.
    """
    descriptor = os.open(folder / _RUNNING, os.O_RDWR | os.O_CREAT, 0o600)
    os.set_inheritable(descriptor, True)
    with suppress(OSError):  # Some file systems have no locks.
        return try_lock(descriptor)
    return True


def claimed(folder: Path) -> bool:
    """Tell whether a device's SuperNode runs now; False where the file system has no locks."""
    return lock_held(folder / _RUNNING) is True
