"""Keeps a client's secrets between the messages of a secure sum on disk. Each is used once."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlora_flwr.errors import FedLoRAError, InvalidValue, OrderRefused
from fedlora_flwr.files import name_of_run, private_folder, read_or_make, replace_file
from fedlora_flwr.secure_sum.party import Advertised, Masked, Shared

State = TypeVar("State", Advertised, Shared, Masked)
SUMS = "sums"
"""Name of the folder in a client's state folder."""
_KEY = "identity.key"


class SumStore:
    """One file for each client and run, with the state that the next message needs.

    A deployed client is a new process for every message, and a server may send messages again, out
    of order or two at a time. A secret is removed when it is read, so no mask is used for two
    uploads, and no upload is opened by two answers.

    Parameters
    ----------
    folder : Path
        The folder of the files. It is made when the first file is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def identity(self) -> Ed25519PrivateKey:
        """Return the key that signs this client's cards. The first call draws it.

        Raises
        ------
        InvalidValue
            The key's file is damaged.
        FileTrouble
            The file cannot be written.
        """
        path = self._folder / _KEY

        def read() -> Ed25519PrivateKey | None:
            if not path.exists():
                return None
            try:
                return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text().strip()))
            except ValueError as error:
                allowed = (
                    "64 hexadecimal digits. Restore the file from a backup. Or remove it, and give "
                    "the other clients the new identity that is then drawn"
                )
                raise InvalidValue("identity key", str(path), allowed) from error

        def make(draft: Path) -> None:
            draft.touch(mode=0o600)
            draft.write_text(Ed25519PrivateKey.generate().private_bytes_raw().hex() + "\n")

        return read_or_make(path, read, make)

    def public_identity(self) -> str:
        """Return this client's identity for the peers' lists of others: 64 hexadecimal digits."""
        return self.identity().public_key().public_bytes_raw().hex()

    def keep(self, client: str, run: str, state: Advertised | Shared | Masked) -> None:
        """Keep the state that the next message needs, in place of any earlier one."""
        private_folder(self._folder)
        content = json.dumps([type(state).__name__, {n: _plain(v) for n, v in vars(state).items()}])
        replace_file(self._path(client, run), content.encode())

    def take(self, client: str, run: str, kind: type[State]) -> State:
        """Read and remove the kept state, so that it is used only once.

        Raises
        ------
        OrderRefused
            No state is kept, or one for another message.
        """
        path = self._path(client, run)
        taken = path.with_suffix(f".{secrets.token_hex(8)}")
        try:
            path.rename(taken)  # If two messages come at once, one succeeds.
            name, values = json.loads(taken.read_bytes())
        except FileNotFoundError:
            name, values = "", {}
        except ValueError as error:
            # No `InvalidValue`: a server reads the text of those, and this names a file.
            text = f"The secrets of a secure sum in {path} are damaged. Begin the round again."
            raise FedLoRAError(text) from error
        finally:
            taken.unlink(missing_ok=True)
        if name != kind.__name__:
            raise OrderRefused(
                "The messages of the secure sum came twice or in another order. This client has "
                "forgotten its keys of the round. Begin the round again."
            )
        return kind(**{name: _restored(value) for name, value in values.items()})

    def _path(self, client: str, run: str) -> Path:
        return self._folder / f"{name_of_run(client, run)}.json"


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, Mapping):
        return {"items": [[key, _plain(entry)] for key, entry in value.items()]}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_restored(entry) for entry in value)
    if not isinstance(value, dict):
        return value
    if "hex" in value:
        return bytes.fromhex(value["hex"])
    return {key: _restored(entry) for key, entry in value["items"]}
