"""Every byte that devices send in real runs is recorded, and each field of it is accounted for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.wire import STATUS, STATUS_EXHAUSTED
from tests.deploy.support import own_cache
from tests.deploy.wire_files import (
    account_for_files,
    files_of,
    number_is_told,
    table_of_files,
    values_of,
)
from tests.deploy.wire_scene import (
    BROKEN,
    MARK,
    NAMES,
    OPEN,
    PERSONAL,
    PLAIN,
    RECORDS,
    SIZED,
    SPENT,
    Scene,
    play,
)
from tests.deploy.wire_table import FAILED, TABLE, account, disguises

pytestmark = pytest.mark.deploy
_LOOPBACK = ("0100007F", "0" * 24 + "01000000")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    base = tmp_path_factory.mktemp("wire")
    with own_cache(base):
        yield play(base)


def test_each_field_that_crosses_the_wire_has_a_reason(scene: Scene) -> None:
    seen = Counter[str]()
    faults = [fault for heard in scene.heard.values() for fault in account(heard, seen)]
    assert faults == []
    assert [place for place in TABLE if not seen[place]] == []


def test_the_runs_were_what_they_should_be(scene: Scene) -> None:
    """Each kind of answer was given, so the table was compared with it."""
    plain, rest = scene.heard[PLAIN], scene.heard[OPEN]
    # Who is heard in the last run is drawn; the first device has spent its budget before.
    assert len(plain.replies) == 1
    assert len(rest.replies) in (4, 5)
    assert values_of(plain)[STATUS] == {"ok", STATUS_EXHAUSTED}
    assert values_of(rest)["num-examples"] == {1, RECORDS[OPEN]}
    kinds = {one.message().metadata.message_type for one in plain.pulled.values()
             if one.kind == "Message"}  # fmt: skip
    assert kinds == {"train", "evaluate", "query"}
    for run, words in ((PERSONAL, "does not evaluate"), (SIZED, "'size' is refused"),
                       (BROKEN, "could not do what was asked")):  # fmt: skip
        assert words in str(RunDirectory(scene.run_dir(run)).rows("rounds")[1]["failures"])
    assert RunDirectory(scene.run_dir(SPENT)).rows("rounds")[1]["declined"]


def test_no_byte_holds_a_record(scene: Scene) -> None:
    hidden = disguises(MARK)
    for heard in scene.heard.values():
        assert [one for one in hidden if one in heard.sent] == []
    # The device's own log quotes the record whose error crossed the wire as a fixed sentence.
    assert MARK in scene.log(PLAIN)
    reasons = [one.message().error.reason for one in scene.heard[PLAIN].pushed.values()
               if one.kind == "Message" and not one.parts]  # fmt: skip
    assert sum(FAILED.fullmatch(reason) is not None for reason in reasons) == 1
    assert str(scene.base) not in "".join(reasons)


def test_the_devices_turn_to_their_server_alone(scene: Scene) -> None:
    for heard in scene.heard.values():
        found = [line for line in heard.addresses if not line.startswith("socket.connect '/")]
        ports = {int(port) for line in found for port in re.findall(r"'127\.0\.0\.1', (\d+)", line)}
        assert all("'127.0.0.1', " in line for line in found), found
        # The tap, and the SuperNode's own port for its client's processes.
        assert heard.port in ports
        assert len(ports) == 2
        assert heard.ends
        assert {host for host, _ in heard.ends} <= set(_LOOPBACK)


def test_what_the_server_writes_has_a_reason(scene: Scene) -> None:
    seen, faults = Counter[str](), []
    told = {name: values_of(heard) for name, heard in scene.heard.items()}
    folders = sorted((scene.base / "runs").iterdir())
    assert len(folders) == 5
    for folder in folders:
        faults += account_for_files(folder, told, seen)
        assert number_is_told(folder, RECORDS[PLAIN]) == []
        opened = folder.name == SIZED
        assert bool(number_is_told(folder, RECORDS[OPEN])) is opened
    assert faults == []
    assert [row for row in table_of_files() if not seen[row]] == []
    for run in (PERSONAL, SIZED):
        summary = RunDirectory(scene.run_dir(run)).summary()
        assert summary is not None
        assert summary["unprotected_metrics"] is True


def test_no_file_of_the_server_holds_a_record(scene: Scene) -> None:
    hidden = disguises(MARK)
    places: list[Path] = [scene.base / "runs", scene.base / "fleet" / "server"]
    files = [file for place in places for _, file in files_of(place)]
    files.append(scene.base / "operator" / "server.log")
    assert any(file.name.startswith("state.sqlite") for file in files)
    for file in files:
        content = file.read_bytes()
        assert [one for one in hidden if one in content] == [], file
    assert all(MARK not in said for said in scene.said.values())
    assert {heard.name for heard in scene.heard.values()} == set(NAMES)
