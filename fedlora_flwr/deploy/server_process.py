"""The program of a fleet's server: Flower's SuperLink, with two of its gaps closed.

Flower's SuperLink does not notice that its SuperExec was killed, without which no run begins. Here
it ends as well, so that the server's unit, or `fedlora deploy run --server`, starts both again.

Many processes write to the SuperLink's database. One that waits for more than five seconds gives up
with "database is locked", which ends a run. Here it waits for a minute.

Source: flwr 1.42, ``superlink/cli/flower_superlink.py`` and ``supercore/sql_mixin.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fedlora_flwr.deploy.children import end_with_children
from fedlora_flwr.deploy.flower import OtherFlower, module_of, program
from fedlora_flwr.deploy.ports import require_free

SUPERLINK = "flower-superlink"
SERVE = "fedlora deploy serve"
_DATABASE, _PRAGMAS, _WAIT = "flwr.supercore.sql_mixin", "SQLITE_PRAGMAS", "busy_timeout"
_PATIENCE = 60_000  # milliseconds
_OTHER_PORT = (
    "end the program that uses it, which may be this server itself, or write another --port into "
    "the server's start.sh, behind --superlink in each device's, and into connection.toml"
)


def wait_longer_for_the_database() -> None:
    """Let each connection to the SuperLink's database wait longer for others.

    Raises
    ------
    OtherFlower
        Flower sets the time to wait in another way.
    """
    module = module_of(_DATABASE)
    pragmas = dict(getattr(module, _PRAGMAS, ()))
    if _WAIT not in pragmas:
        raise OtherFlower(f"{_DATABASE} has no {_WAIT}")
    setattr(module, _PRAGMAS, tuple({**pragmas, _WAIT: str(_PATIENCE)}.items()))


def serve(arguments: Sequence[str]) -> None:
    """Be a SuperLink, until a signal or the end of its SuperExec.

    Parameters
    ----------
    arguments : Sequence[str]
        The arguments for ``flower-superlink``.

    Raises
    ------
    OtherFlower
        The installed version of Flower is not known to work this way.
    PortTaken
        Another program listens on the server's port.
    """
    require_free(arguments, _OTHER_PORT)
    sys.argv = [SUPERLINK, *arguments]
    run = program(SUPERLINK)
    wait_longer_for_the_database()
    # With an expired certificate SuperExec ends by itself. The server stays, and tells devices why.
    end_with_children("The server's SuperExec was killed, so its SuperLink ends too.", killed=True)
    run()
