"""The program that a device runs for each message, instead of Flower's ``flwr-clientapp``.

``fedlora deploy start`` installs it. It checks the run's app bundle and answers with the installed
package's app. For any other bundle the server gets the refusal as an error reply.
"""

from __future__ import annotations

import sys
from logging import ERROR

from flwr.app import Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.logger import log

from fedlora_flwr.deploy.bundles import BundleRefused, check_bundle
from fedlora_flwr.deploy.flower import handle_with
from fedlora_flwr.flower_internals import ErrorCode

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
        log(ERROR, "%s", refusal)
        return _refusing(str(refusal))
    from fedlora_flwr.client_app import app

    return app


def _refusing(reason: str) -> ClientAppCallable:
    def refuse(message: Message, context: Context) -> Message:  # noqa: ARG001
        return Message(Error(ErrorCode.INVALID_FAB, reason), reply_to=message)

    return refuse


def main() -> None:
    """Answer the one message that SuperExec names on the command line."""
    handle = handle_with(app_for)
    if sys.argv[1:] != [TRY]:
        handle()


if __name__ == "__main__":
    main()
