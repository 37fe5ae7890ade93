"""What a device runs for each message in the place of Flower's ``flwr-clientapp``.

``fedlora deploy start`` puts it there. It looks at the run's app bundle and answers with the
installed package's app; whoever ships another bundle gets the refusal as an error reply.
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
"""Argument with which nothing is served: the exit code says whether this Flower can be used."""


def app_for(bundle: bytes) -> ClientAppCallable:
    """Return the installed app, or for a bundle that a device does not serve one that says so.

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
    """Answer one message, as SuperExec asks on the command line."""
    handle = handle_with(app_for)
    if sys.argv[1:] != [TRY]:
        handle()


if __name__ == "__main__":
    main()
