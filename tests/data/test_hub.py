from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from fedlora_flwr.data import hub
from tests.data.hub import away


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let a server of this machine be the hub; return what it was asked for."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            seen.append(self.path)
            # Whatever the answer, somebody is there.
            self.send_response(503)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub._asked.cache_clear()
    yield seen
    server.shutdown()
    server.server_close()
    thread.join()
    hub._asked.cache_clear()


def test_a_hub_that_answers_is_asked_once_a_minute(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 600.0
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr("fedlora_flwr.data.hub.time", clock)
    assert hub.hub_answers()
    now += 59
    assert hub.hub_answers()
    assert len(asked) == 1
    now += 2
    assert hub.hub_answers()
    assert len(asked) == 2


def test_a_hub_that_must_not_be_asked_is_not(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.hub_answers()
    assert not asked


def test_nobody_there_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away(monkeypatch, tmp_path)
    assert not hub.hub_answers()


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("gone", [False, True])
def test_the_client_is_kept_to_its_copies_and_let_go(
    before: bool, gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", before)

    def fail() -> None:
        with hub.own_copies_only(gone):
            assert constants.is_offline_mode() is (before or gone)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert constants.is_offline_mode() is before
