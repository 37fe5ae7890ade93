"""The program that a device runs for each message, instead of Flower's ``flwr-clientapp``.

``fedlora deploy start`` installs it. It checks the run's app bundle and answers with the installed
package's app. For any other bundle the server gets the refusal as an error reply.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from logging import ERROR
from typing import TYPE_CHECKING

from fedlora_flwr.deploy.bundles import BundleRefused, check_bundle
from fedlora_flwr.deploy.flower import handle_with
from fedlora_flwr.processes import uncollected

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.clientapp.typing import ClientAppCallable

PARENT = "--parent-pid"
"""SuperExec's own process, which it names on the command line."""
TRY = "--try"
"""With this argument no message is served; the exit code says whether this Flower can be used."""


def app_for(bundle: bytes) -> ClientAppCallable:
    """Return the installed app; for a bundle that is refused, return an app that says why.

    Parameters
    ----------
    bundle : bytes
        The run's app bundle.
    """
    try:
        check_bundle(bundle)
    except BundleRefused as refusal:
        from flwr.common.logger import log

        log(ERROR, "%s", refusal)
        return _refusing(str(refusal))
    with uncollected():
        from fedlora_flwr.client_app import app

    return app


def _refusing(reason: str) -> ClientAppCallable:
    from flwr.app import Error, Message

    from fedlora_flwr.flower_internals import ErrorCode

    def refuse(message: Message, context: Context) -> Message:  # noqa: ARG001
        return Message(Error(ErrorCode.INVALID_FAB, reason), reply_to=message)

    return refuse


def end_with(parent: int, grace: float = 10.0) -> None:
    """End this process when its parent is gone and some seconds have passed.

    Flower's own way to end it then waits forever: it wants to tell a SuperNode that is gone, too.
    """
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(grace)
    os._exit(1)


def main() -> None:
    """Answer the one message that SuperExec names on the command line."""
    if PARENT in sys.argv:
        parent = int(sys.argv[sys.argv.index(PARENT) + 1])
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    with uncollected():
        handle = handle_with(app_for)
    if sys.argv[1:] != [TRY]:
        handle()


if __name__ == "__main__":
    main()
