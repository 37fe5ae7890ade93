"""Asks a fleet's SuperLink what it knows of devices and runs, as ``flwr list`` does.

Source: flwr 1.42, ``superlink/servicer/control/control_handlers.py``.
"""

from __future__ import annotations

import hashlib
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any

import httpx

from fedlora_flwr import flower_internals as flower
from fedlora_flwr.simulations.connection import FINISHED, SuperLinkError

_ANSWER = 10.0  # Seconds in which a server has to answer.
_GONE = "unregistered"
ONLINE = "online"


class Untrusted(SuperLinkError):
    """The certificate of the server cannot be trusted."""


@dataclass(frozen=True)
class Node:
    """A device whose key is registered.

    Parameters
    ----------
    name : str
        The name under which the operator registered it, or Flower's id of it.
    key : str
        Fingerprint of its public key, as in the server's ``identities.json``.
    state : str
        ``"online"``, ``"offline"``, or ``"registered"`` if it has never connected.
    seen : datetime, optional
        When it was connected last, by the server's clock.
    """

    name: str
    key: str
    state: str
    seen: datetime | None


@dataclass(frozen=True)
class ServerRun:
    """A run that the server knows.

    Parameters
    ----------
    id : str
        Flower's id of it.
    status : str
        Flower's own, such as ``"running"`` or ``"finished:completed"``.
    details : str
        What Flower adds to the status of a run that failed.
    folder : str
        The folder of its results on the server; empty if the run names none.
    """

    id: str
    status: str
    details: str
    folder: str

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self.status.startswith(FINISHED)


@dataclass(frozen=True)
class Control:
    """Where a SuperLink answers its operator.

    Parameters
    ----------
    address : str
        Host and port.
    authority : Path
        Certificate of the fleet's CA.
    """

    address: str
    authority: Path

    def answers(self) -> bool:
        """Tell whether a SuperLink answers.

        Raises
        ------
        Untrusted
            Its certificate is out of date, of another CA, or for another name.
        """
        trusted = ssl.create_default_context(cafile=self.authority)
        url = f"https://{self.address}/health"
        try:
            with urllib.request.urlopen(url, timeout=_ANSWER, context=trusted):
                return True
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise Untrusted(
                    f"The certificate of the server at {self.address} cannot be trusted "
                    f"({error.reason.verify_message})."
                ) from error
            return False
        except (OSError, HTTPException):  # It speaks something else.
            return False

    def nodes(self) -> list[Node]:
        """Return the registered devices. Keys that were removed are left out.

        Raises
        ------
        SuperLinkError
            The server does not answer, or in a way that is not known here.
        """
        found = self._ask("ListNodes", flower.ListNodesRequest())
        return [_node(info, found.now) for info in found.nodes_info if info.status != _GONE]

    def runs(self) -> list[ServerRun]:
        """Return the last 20 runs, the newest first.

        Raises
        ------
        SuperLinkError
            The server does not answer, or in a way that is not known here.
        """
        found = self._ask("ListRuns", flower.ListRunsRequest()).run_dict.values()
        return [_run(run) for run in sorted(found, key=lambda run: run.pending_at, reverse=True)]

    def _ask(self, method: str, request: Any) -> Any:
        trusted = ssl.create_default_context(cafile=self.authority)
        try:
            with flower.ControlHttpClient(
                f"https://{self.address}", verify=trusted, timeout=_ANSWER
            ) as client:
                return getattr(client, method)(request)
        except (httpx.HTTPError, ImportError, ValueError) as error:
            raise SuperLinkError(
                f"The SuperLink at {self.address} did not answer {method} ({error}). Install the "
                "same version of flwr here and on the server."
            ) from error


def _node(info: Any, now: str) -> Node:
    seen = now if info.status == ONLINE else info.last_deactivated_at
    return Node(
        name=info.name or str(info.node_id),
        key=hashlib.sha256(info.public_key).hexdigest(),
        state=info.status,
        seen=datetime.fromisoformat(seen) if seen else None,
    )


def _run(run: Any) -> ServerRun:
    config = flower.user_config_from_proto(run.override_config)
    folders = (
        str(config.get(name) or "") for key in ("resume", "run-dir") for name in (f"run.{key}", key)
    )
    return ServerRun(
        id=str(run.run_id),
        status=":".join(filter(None, (run.status.status, run.status.sub_status))),
        details=run.status.details,
        folder=next(filter(None, folders), ""),
    )
