"""Every byte that devices send under a secure sum is recorded, and each field is accounted for.

The attacker is the server. It sees all bytes, leads the exchange, and may send any order. A curious
one ships the package's bundle and runs other code.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.wire import OPEN_SUM, SHOW_KEYS, UPLOAD
from tests.deploy import curious
from tests.deploy.masked_heard import SeenRound, chance_of_uniform
from tests.deploy.masked_scene import (
    CLEAR,
    CURIOUS,
    GONE,
    NAMES,
    RECORDS,
    TWO_GONE,
    WHOLE,
    MaskedScene,
    play,
)
from tests.deploy.masked_table import MASKED, MASKED_ROUNDS
from tests.deploy.support import own_cache
from tests.deploy.wire_files import account_for_files, files_of, number_is_told, values_of
from tests.deploy.wire_scene import MARK
from tests.deploy.wire_table import account, disguises

pytestmark = pytest.mark.deploy
# Uniform words fail one of these tests once in a million times; there are fewer than 50.
LEAST = 1e-6


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MaskedScene]:
    base = tmp_path_factory.mktemp("masked")
    with own_cache(base):
        yield play(base)


@pytest.fixture(scope="module")
def runs(scene: MaskedScene) -> dict[int, int]:
    """Runs by the number of uploads: recorded connections stand beside each other."""
    assert len({answer.run for answer in scene.heard[NAMES[0]].of_stage(SHOW_KEYS)}) == 4
    answers = [answer for heard in scene.heard.values() for answer in heard.of_stage(UPLOAD)]
    found = {count: run for run, count in Counter(answer.run for answer in answers).items()}
    assert sorted(found) == [2, 3, 4]
    return found


@pytest.fixture(scope="module")
def rounds(scene: MaskedScene, runs: dict[int, int]) -> dict[str, SeenRound]:
    """The two rounds whose sums were opened, as the server sees them."""
    return {name: SeenRound.of(scene.heard, runs[n]) for name, n in ((WHOLE, 4), (GONE, 3))}


def test_each_field_that_crosses_in_a_masked_run_has_a_reason(scene: MaskedScene) -> None:
    seen = Counter[str]()
    faults = [fault for heard in scene.heard.values() for fault in account(heard, seen, MASKED)]
    assert faults == []
    assert [place for place in MASKED if not seen[place]] == []


def test_no_byte_holds_a_record_or_its_number(scene: MaskedScene) -> None:
    hidden = disguises(MARK)
    for heard in scene.heard.values():
        assert [one for one in hidden if one in heard.sent] == []


def test_the_runs_were_what_they_should_be(scene: MaskedScene) -> None:
    """A whole sum, sums with one and two devices gone after they agreed, and two other servers."""
    for name, shares, opened in ((WHOLE, 4, True), (GONE, 3, True), (TWO_GONE, 2, False)):
        rows = RunDirectory(scene.base / "runs" / name).rows("rounds")
        assert len(rows) == 2, scene.said[name]
        found = (rows[1]["shares"], rows[1]["opened"], len(rows[1]["failures"]))
        assert found == (shares, opened, 4 - shares), scene.said[name]
    assert "trust-model" in scene.said[CLEAR]
    assert list(scene.told) == [
        curious.EVALUATED, curious.DOUBLED, curious.OPENED, curious.SIZED,
    ]  # fmt: skip


def test_a_summary_tells_of_masks_and_a_closed_sum_moves_nothing(scene: MaskedScene) -> None:
    whole, closed = (
        RunDirectory(scene.base / "runs" / name).summary() for name in (WHOLE, TWO_GONE)
    )
    assert whole is not None
    assert closed is not None
    assert whole["remarks"]["secure sum"].startswith("masked by the clients")
    assert closed["final_accuracy"] == closed["initial_accuracy"]


def test_the_words_of_one_device_are_uniform(rounds: dict[str, SeenRound]) -> None:
    """A chi-square test on the bytes of a masked upload, and of each two uploads' difference."""
    for seen in rounds.values():
        for words in seen.uploads.values():
            assert len(words) > 400
            assert chance_of_uniform(words) > LEAST
        for one, other in combinations(seen.uploads.values(), 2):
            assert chance_of_uniform(one - other) > LEAST


def test_what_is_opened_is_one_sum_and_no_part_of_it(rounds: dict[str, SeenRound]) -> None:
    """The server takes off all masks that it can work out of what the devices handed out."""
    for name, seen in rounds.items():
        everybody = tuple(seen.uploads)
        assert len(everybody) == (4 if name == WHOLE else 3)
        for size in range(1, len(everybody)):
            for chosen in combinations(everybody, size):
                assert chance_of_uniform(seen.without_known_masks(chosen)) > LEAST, chosen
        opened = seen.without_known_masks(everybody).view(np.int32)
        assert chance_of_uniform(opened.view(np.uint32)) < 1e-30
        assert int(np.sum(opened == sum(RECORDS[one] for one in everybody))) >= 1


def test_no_device_hands_out_a_share_where_too_many_are_gone(
    scene: MaskedScene, runs: dict[int, int]
) -> None:
    answers = [answer for heard in scene.heard.values() for answer in heard.of_stage(OPEN_SUM)]
    assert Counter(answer.run for answer in answers) == {runs[4]: 4, runs[3]: 3}


def test_a_curious_server_gets_nothing_else(scene: MaskedScene) -> None:
    told = scene.told
    assert "answered" not in told.values()
    # Who uploaded has spent, also where nothing was opened. In the clear nobody uploaded.
    for name, uploads in zip(NAMES, (3, 3, 2, 1), strict=True):
        assert len(scene.heard[name].of_stage(UPLOAD)) == uploads, (name, told)
        with sqlite3.connect(scene.device(name) / "state" / "ledger.sqlite") as db:
            rows = db.execute("SELECT trust FROM releases").fetchall()
        assert rows == [("secure-sum, 1 of 3 shares",)] * uploads


def test_what_server_and_devices_write_holds_no_record(
    scene: MaskedScene, rounds: dict[str, SeenRound]
) -> None:
    seen, faults = Counter[str](), []
    told = {name: values_of(heard) for name, heard in scene.heard.items()}
    for name in (WHOLE, GONE, TWO_GONE):
        folder = scene.base / "runs" / name
        faults += account_for_files(folder, told, seen, MASKED_ROUNDS)
        for count in RECORDS.values():
            assert number_is_told(folder, count) == []
    assert faults == []
    hidden = disguises(MARK)
    places = [scene.base / "runs", scene.base / "fleet" / "server"]
    places += [scene.device(name) / "state" for name in NAMES]
    files: list[Path] = [file for place in places for _, file in files_of(place)]
    secrets = [secret for one in rounds.values() for secret in one.secrets.values()]
    assert len(secrets) == 8
    for file in files:
        content = file.read_bytes()
        assert [one for one in hidden if one in content] == [], file
        if "devices" in file.parts:
            assert not any(one in content or one.hex().encode() in content for one in secrets)


def test_a_device_forgets_what_hides_its_uploads(scene: MaskedScene) -> None:
    for run in (WHOLE, GONE, TWO_GONE, CLEAR, CURIOUS):
        assert {name.split(".")[-1] for name in scene.kept[run]} <= {"key", "json", "lock"}
    for name in NAMES:
        key = scene.device(name) / "state" / "sums" / "identity.key"
        assert key.stat().st_mode & 0o77 == 0
