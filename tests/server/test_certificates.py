"""Warnings of certificates that end before a run does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedlora_flwr.deploy.identities import make_certificates, renew_server
from fedlora_flwr.server.certificates import Certificates
from fedlora_flwr.server.rounds import RoundRow

DAY = 86_400.0


@pytest.fixture
def warned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Callable[[], list[str]]:
    """Return the warnings since the last call."""
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)

    def take() -> list[str]:
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    return take


def row(number: int, seconds: float) -> RoundRow:
    return {"round": number, "seconds": seconds}


def test_one_that_ends_within_a_week_is_named_at_the_start(
    tmp_path: Path, warned: Callable[[], list[str]]
) -> None:
    make_certificates(tmp_path, "localhost", days=6)
    Certificates(tmp_path, 10).at_start()
    (said,) = warned()
    end = datetime.now(UTC) + timedelta(days=6)
    assert said.startswith(f"The server's certificate is about to end ({end:%Y-%m-%d}). ")
    assert "`fedlora deploy renew FLEET`" in said
    renew_server(tmp_path, tmp_path, "localhost", days=8)
    Certificates(tmp_path, 10).at_start()
    assert warned() == []


def test_one_that_ends_before_the_rounds_that_are_left_is_named_once(
    tmp_path: Path, warned: Callable[[], list[str]]
) -> None:
    make_certificates(tmp_path, "localhost", days=30)
    watched = Certificates(tmp_path, 11)
    watched.at_start()
    watched.after_round(row(0, 99 * DAY))  # Nothing was asked of a device.
    watched.after_round(row(1, 2.9 * DAY))  # 10 rounds of 2.9 days each are left.
    assert warned() == []
    watched.after_round(row(2, 9 * DAY))  # 9 rounds of 5.95 days each.
    watched.after_round(row(3, 9 * DAY))
    (said,) = warned()
    assert " before this run does: 9 rounds are left, of about 514080 s each. " in said


def test_the_authoritys_cannot_be_renewed(tmp_path: Path, warned: Callable[[], list[str]]) -> None:
    make_certificates(tmp_path, "localhost", days=30)
    watched = Certificates(tmp_path, 2)
    watched.after_round(row(1, 3_700 * DAY))  # Its own ten years are shorter.
    server, authority = warned()
    assert "fedlora deploy renew" in server
    assert "The certificate of the fleet's CA will end (" in authority
    assert "fedlora deploy init" in authority


def test_the_last_round_and_folders_without_certificates_are_silent(
    tmp_path: Path, warned: Callable[[], list[str]]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "server.pem").write_text("nothing")
    for folder in (empty, tmp_path):
        Certificates(folder, 2).at_start()
    make_certificates(tmp_path, "localhost", days=30)
    Certificates(tmp_path, 2).after_round(row(2, 99 * DAY))
    assert warned() == []
