"""The hub's client in tests: its copies in a folder of the test's, and nobody who answers."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from fedlora_flwr.data import hub


def away(monkeypatch: pytest.MonkeyPatch, copies: Path, *, told: bool = False) -> list[str]:
    """Make the hub one that does not answer; ``told`` is what ``HF_HUB_OFFLINE=1`` does.

    Return the hosts that were asked for, which grows.
    """
    asked: list[str] = []

    def nobody(host: str, *_: object, **__: object) -> None:
        asked.append(host)
        raise OSError(f"{host} is away")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(copies))
    monkeypatch.setattr(constants, "ENDPOINT", "http://the.hub")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", told)
    hub._asked.cache_clear()
    return asked


def keep_copy(copies: Path, name: str, source: Path) -> None:
    """Lay a folder out as the client does with what it has fetched."""
    folder = copies / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123abc")
    shutil.copytree(source, folder / "snapshots" / "0123abc")
