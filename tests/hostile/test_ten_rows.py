"""Ten things that a server could do to an earlier version, each as it was done."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora_flwr.privacy.ledger import Ledger
from tests.hostile import canaries
from tests.hostile.accounting import is_a_filter, is_bounded_by_first
from tests.hostile.conftest import MakeDevice
from tests.hostile.device import DELTA, EPSILON, RUN, Device, records, start
from tests.hostile.sums import CLEAR, moved, run_of, summed
from tests.hostile.texts import own_arrays, plant
from tests.hostile.tiny_task import READS, RECORDS, points


def test_1_a_run_cannot_evaluate_on_private_records(make_device: MakeDevice, counted: None) -> None:
    """A run that named the private split as its test split got exact figures on it."""
    attack = {"test-split": "records", "test-limit": 1, "report-unprotected-metrics": True}
    for device in (make_device(), make_device(test_split="public")):
        opened, figures = READS.opened, device.public.figures
        for shared in ({"share": "A"}, {"share": "B"}, {}):
            for run in (attack, {**attack, "train-split": "public"}, {"test-split": "train"}):
                answer = device.ask("evaluate", records(start(4), shared), {**RUN, **run})
                assert answer.kind == ("ok" if figures and shared else "refused")
        assert READS.opened == opened
    planted = plant(make_device, canaries.text_lines)
    arrays = own_arrays(planted)
    for split in (canaries.TRAIN, canaries.TEST):
        run = {**planted.run, "test-split": split, "test-limit": 1}
        assert planted.ask("evaluate", records(arrays, {"share": "A"}), run).kind == "refused"
    # Nor a device whose own file names the private records by another name.
    shared_file = make_device(test_split="copy")
    os.link(shared_file.folder / "records.npy", shared_file.folder / "copy.npy")
    assert shared_file.ask("evaluate", records(start(4), {"share": "A"})).kind == "failed"


def test_2_errors_tell_no_record(make_device: MakeDevice, counted: None) -> None:
    """Errors of our own named the largest class, all values of a column, or a whole record."""
    wrong: list[dict[str, Any]] = [
        {"num-classes": 1}, {"num-classes": 2, "class-names": "a,b"}, {"label-column": "text"},
        {"label-column": f"text-{canaries.CANARY}"}, {"input-columns": f"kind-{canaries.CANARY}"},
        {"input-columns": "text"}, {"model": "../.."}, {"train-limit": 1}, {"max-length": 8},
    ]  # fmt: skip
    device = plant(make_device, canaries.text_lines, epsilon=9.0)
    arrays = own_arrays(device)
    for changes in wrong:
        answer = device.ask("train", records(arrays, {"plan": "*"}), {**device.run, **changes})
        assert answer.kind in ("ok", "refused", "budget-exhausted", "failed")
    for build in (canaries.unknown_class, canaries.broken_lines, canaries.refusing_template):
        broken = plant(make_device, build)
        arrays = own_arrays(broken)
        assert broken.ask("train", records(arrays, {"plan": "*"})).kind == "failed"
        assert not broken.rows()


def test_3_a_run_cannot_have_a_fresh_ledger(
    make_device: MakeDevice, tmp_path: Path, data_folder: Path
) -> None:
    """A device's file without a state folder let each run bring its own, and with it a budget."""
    device = make_device(state_dir="")
    device.state = data_folder / "fedlora"
    device.inside.append(data_folder)
    trained = 0
    for run_id in range(1, 12):
        place = tmp_path / f"fresh-{run_id}"
        run = {**RUN, "state-dir": str(place), "ledger-scope": "run", "num-rounds": 2}
        for number in range(2):
            content = device.order(server_round=number, plan="*")
            trained += device.ask("train", content, run, run_id=run_id).kind == "ok"
        assert not place.exists()
    assert 0 < trained < 22
    assert len(device.rows()) == trained
    assert is_bounded_by_first(device.rows(), EPSILON, DELTA) or is_a_filter(
        [device.rows()], EPSILON, DELTA
    )


def test_4_a_run_cannot_choose_a_folder(make_device: MakeDevice, counted: None) -> None:
    """A subset of ``../..`` or an absolute path trained on any folder of the device."""
    device = plant(make_device, canaries.text_lines)
    arrays, bait = own_arrays(device), device.outside.folder
    for number, changes in enumerate(
        [
            {"dataset-subset": "../.."}, {"dataset-subset": str(bait)}, {"dataset": str(bait)},
            {"dataset-subset": "../../outside/bait"}, {"train-split": "../../outside/bait/train"},
            {"model": str(bait / "model")}, {"weights": str(bait / "model" / "config.json")},
            {"train-split": "*"}, {"partition-column": "text", "partitioner": "natural-id"},
        ]
    ):  # fmt: skip
        content = records(arrays, {"plan": "*", "server-round": number})
        answer = device.ask("train", content, {**device.run, **changes})
        # The run's words count for nothing; the device trains on its own.
        assert answer.kind in ("ok", "budget-exhausted"), (changes, answer)


@pytest.mark.parametrize("clip", [1e-6, 1e-3, 1.0, 1e3])
def test_5_noise_is_there_at_any_clip_norm(make_device: MakeDevice, clip: float) -> None:
    """A clip norm of 1.4e-45 rounded the noise to zero, and 1e300 made it overflow."""
    device = make_device(ledger_scope="run")
    for outside in (1.4e-45, 5e-324, 1e-30, 9.9e-7, 0.0, -1.0, 1e7, 1e300, float("inf")):
        assert device.ask("train", device.order(), {**RUN, "clip-norm": outside}).kind == "refused"
    rate = min(1e4, 1 / clip)
    run = {**RUN, "clip-norm": clip, "lr-a": rate, "lr-b": rate, "lr-head": rate, "rank": 64}
    sent = {name: np.zeros_like(values) for name, values in start(64).items()}
    # Fresh noise each time: two uploads differ by twice its variance, and by clipped gradients.
    one, two = (
        summed(device.ask("train", records(sent, {"plan": "*"}), run, run_id=n), sent, 4)
        for n in (1, 2)
    )
    sigma = device.rows()[-1]["noise_multiplier"]
    deviation = np.std(one - two) / np.sqrt(2) / rate / clip
    assert 0.9 * sigma < deviation < 1.1 * sigma + 2 * RECORDS / np.sqrt(one.size)


@pytest.mark.parametrize("task", ["own_norm", "running_norm", "mixup", "router", "evo_norm"])
def test_6_a_model_that_mixes_records_is_refused_or_harmless(
    make_device: MakeDevice, task: str
) -> None:
    """The structural check looked in evaluation mode, where such layers mix nothing."""
    name = f"tests.hostile.mixing_tasks:{task}"
    sums = []
    for other in (False, True):
        table = points(1)
        if other:  # The neighbor: this record's gradient is zero, and its content another's.
            table[3] = points(8)[0]
            table[3, :-2], table[3, -1] = 30 * table[3, :-2], 0
        device = make_device(task=name, records=table, **CLEAR)
        answer = device.ask("train", device.order(plan="*"), run_of(device, RECORDS))
        if answer.kind == "failed":
            # The failure may depend on records, so it is counted.
            assert len(device.rows()) == 1
            return
        sums.append(summed(answer, start(4), RECORDS))
    assert moved(*sums) <= 1.01


def test_7_large_arrays_let_no_record_move_others(make_device: MakeDevice, counted: None) -> None:
    """Entries of 1e15 made attention to padding overflow, and all shorter records NaN."""
    device = make_device()
    for entry in (1e4 * 1.01, 1e15, 1e19, 3e38, -1e15):
        large = {name: np.full_like(values, entry) for name, values in start(4).items()}
        assert device.ask("train", records(large, {"plan": "*"})).kind == "refused"
    for scale, alpha in ((1.0, 8.0), (3.0, 8.0), (10.0, 8.0), (1e4, 8.0), (1e4, 1e5)):
        sums = []
        for words in (1, 20):
            planted = plant(make_device, _with_a_record_of(words), delta=1e-3, **CLEAR)
            # Without dropout, whose masks are drawn for whatever shape a batch has.
            run = run_of(
                planted, canaries.PRIVATE, lora_alpha=alpha, max_length=48, backbone_dropout=False
            )
            arrays = _grown(own_arrays(planted, run), scale)
            answer = planted.ask("train", records(arrays, {"plan": "*"}), run)
            if answer.kind == "ok":
                sums.append(summed(answer, arrays, canaries.PRIVATE))
        # The look at the structure may find such arrays unfit. It reads no record for that.
        assert len(sums) in ((2,) if scale < 5 else (0, 2)), scale
        # One record was replaced by another, so its own part may move by 2.
        assert not sums or moved(*sums) <= 2.05, (scale, alpha)


def _with_a_record_of(words: int) -> canaries.Builder:
    def build(folder: Path) -> canaries.Planted:
        planted = canaries.text_lines(folder)
        file = Path(planted.settings["dataset"]) / f"{canaries.TRAIN}.jsonl"
        lines = file.read_text().splitlines()
        lines[0] = lines[0].replace("the film 0", " ".join(["film"] * words))
        file.write_text("\n".join(lines))
        return planted

    return build


def _grown(arrays: dict[str, Any], scale: float) -> dict[str, Any]:
    """Return arrays of a size: factors at ``scale``, heads as small as they are."""
    draw = np.random.default_rng(4)
    return {
        name: (draw.choice([-1.0, 1.0], values.shape) * scale).astype("f4")
        if ".lora_" in name
        else values
        for name, values in arrays.items()
    }


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("failing", 1),
        ("failing_later", 1),
        ("panicking", 1),
        ("refusing", 1),
        ("refusing_at_once", 0),
        ("unreadable", 0),
    ],
)
def test_8_a_failure_after_the_first_batch_is_in_the_ledger(
    make_device: MakeDevice, task: str, row: int
) -> None:
    """A failure that depended on the first step's noisy result was a free query."""
    name = f"tests.hostile.mixing_tasks:{task}"
    device = make_device(task=name)
    device.secret.append("qzjxk")
    # All records join each step, so that no step is without a batch.
    run = {**RUN, "task": name, "local-steps": 6, "num-rounds": 6, "batch-size": RECORDS}
    for number in range(1, 9):
        answer = device.ask("train", device.order(server_round=number, plan="*"), run)
        # Failures spend the budget, and end with it.
        assert answer.kind == ("failed" if number <= 6 or not row else "budget-exhausted")
        assert len(device.rows()) == row * min(number, 6)


def test_8_an_upload_that_overflows_is_in_the_ledger(make_device: MakeDevice) -> None:
    device = make_device(ledger_scope="run")
    rates = {"lr-a": 1e4, "lr-b": 1e4, "lr-head": 1e4, "clip-norm": 1e6, "weight-decay": 1e3}
    run = {**RUN, **rates, "local-steps": 6, "num-rounds": 6}
    answer = device.ask("train", device.order(plan="*"), run)
    assert answer.kind == "failed"
    assert len(device.rows()) == 1


@pytest.mark.parametrize("settings", [{}, {"run_epsilon": 3.6}, {"run_epsilon": 6.0}])
@pytest.mark.parametrize("late", [False, True])
def test_9_runs_that_follow_the_first_ones_result_stay_within_the_budget(
    make_device: MakeDevice,
    settings: dict[str, Any],
    late: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ε was 3.25 under a budget of 3: the second run was chosen after the first one's result."""
    if late:  # What the first run has reserved and not taken is free again.
        defaults: dict[str, Any] = Ledger.__init__.__kwdefaults__ or {}
        monkeypatch.setitem(defaults, "lapse", 0.0)
    second: list[dict[str, Any]] = [
        {"num-rounds": 1}, {"num-rounds": 8}, {"num-rounds": 2, "batch-size": 12},
        {"num-rounds": 16, "batch-size": 1},
    ]  # fmt: skip
    branches = []
    for later in second:
        device = make_device(**settings)
        # The first run stops early, and leaves a part of the budget to choose for.
        _spend(device, {**RUN, "num-rounds": 4}, run_id=1, rounds=1)
        for run_id in range(2, 8):
            _spend(device, {**RUN, **later}, run_id)
        branches.append(device.rows())
    assert all(branches)
    # The first run is the same in all, so one rule must bound whatever follows it.
    fixed = all(is_bounded_by_first(rows, EPSILON, DELTA) for rows in branches)
    assert fixed or is_a_filter(branches, EPSILON, DELTA)


def _spend(device: Device, run: dict[str, Any], run_id: int, rounds: int | None = None) -> None:
    for number in range(rounds or run["num-rounds"]):
        content = device.order(server_round=number, plan="*")
        if device.ask("train", content, run, run_id=run_id).kind != "ok":
            return


def test_10_a_run_cannot_name_code(make_device: MakeDevice) -> None:
    """``task = "module:function"`` imported and called any code on the device's path."""
    device = make_device()
    for name in (
        "bait_task:make", "os:system", "builtins:exec", "tests.hostile.mixing_tasks:mixup",
        "digits", "text-classification", "tests.hostile.tiny_task:TinyTask", "", ":", "a:b:c",
    ):  # fmt: skip
        answer = device.ask("train", device.order(plan="*"), {**RUN, "task": name})
        assert answer.kind == "refused"
    for key in ("model", "weights", "device", "compile", "quantization", "run-dir", "blocks"):
        device.ask("train", device.order(x=1), {**RUN, key: "bait_task:make"})
    assert not device.rows()
