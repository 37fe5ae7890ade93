"""Arrays of a message: names, shapes, types, values and bytes that no honest server sends."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st

from tests.hostile.conftest import MakeDevice
from tests.hostile.device import RUN, Device, records, start
from tests.hostile.orders import damaged_bytes, examples, hostile_arrays, sound_arrays
from tests.hostile.support import legacy


def test_arrays_that_are_not_the_models(device: Device) -> None:
    kinds = st.sampled_from(["train", "train", "evaluate", "legacy"])
    configs = st.sampled_from([{}, {"plan": "*", "server-round": 1}, {"share": "A"}])

    @examples(2_500)
    @given(hostile_arrays(device.outside.mark), configs, kinds)
    def sent(arrays: dict[str, Any], config: dict[str, Any], kind: str) -> None:
        # Arrays in legacy records have no names but their order.
        placed = kind == "legacy" and len(arrays) == len(start(4))
        if not _is_hostile(
            dict(zip(start(4), arrays.values(), strict=False)) if placed else arrays, config
        ):
            return
        if kind == "legacy":
            answer = device.ask("train", legacy("fitins", arrays, config))
        else:
            answer = device.ask(kind, records(arrays, config))
        assert answer.kind in ("refused", "failed"), arrays

    sent()
    assert device.sent >= 2_000, device.sent
    assert not device.rows()


def _is_hostile(arrays: dict[str, Any], config: dict[str, Any]) -> bool:
    """Tell whether a device must refuse arrays: changes may have made up for each other."""
    if set(arrays) != set(start(4)):
        return not config.get("share") or not set(arrays) <= set(start(4))
    for name, usual in start(4).items():
        values = arrays[name]
        if isinstance(values, Array):
            values = _read(values.data)
        if values.shape != usual.shape or values.dtype.kind != "f":
            return True
        if not (np.abs(values) <= 1e4).all():
            return True
    return False


def _read(data: bytes) -> Any:
    """Return what NumPy reads of bytes, and something that no model has where it reads nothing."""
    try:
        found = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception:  # NumPy's reader raises errors of many types.
        return np.zeros(0, object)
    return found if isinstance(found, np.ndarray) else np.zeros(0, object)


def test_each_damaged_array_runs_no_code(spent: Device) -> None:
    for data in damaged_bytes(spent.outside.mark):
        for kind in ("numpy.ndarray", "pickle", ""):
            arrays = {**start(4), "head.bias": Array("float32", (3,), kind, data)}
            assert spent.ask("train", records(arrays, {"plan": "*"})).kind in ("refused", "failed")
            assert spent.ask("train", legacy("fitins", arrays, {})).kind in ("refused", "failed")
    assert not spent.outside.mark.exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e4 * 1.001, -1e15, 1e15, 1e38])
def test_one_entry_that_is_too_large_or_no_number(device: Device, value: float) -> None:
    for name, values in start(4).items():
        bad = values.copy()
        bad.flat[-1] = value
        answer = device.ask("train", records({**start(4), name: bad}, {"plan": "*"}))
        assert answer.kind == "refused"
        assert name in answer.reason


def test_sound_arrays_in_any_form_train(make_device: MakeDevice) -> None:
    device = make_device(ledger_scope="run")

    @examples(60)
    @given(sound_arrays(), st.sampled_from([{"plan": "*"}, {}, {"plan": "A"}, {"share": "B"}]))
    def sent(arrays: dict[str, Any], config: dict[str, Any]) -> None:
        answer = device.ask("train", records(arrays, config), run_id=100 + device.sent)
        assert answer.kind == "ok", answer

    sent()
    assert len(device.rows()) == device.sent


def test_folded_pairs_train_or_are_refused(make_device: MakeDevice) -> None:
    device = make_device(ledger_scope="run")
    pair = {
        f"blocks.0.fc.folded_{factor}.weight": np.full(shape, 1e4, "f4")
        for factor, shape in (("B", (8, 2)), ("A", (2, 8)))
    }
    one = dict([next(iter(pair.items()))])
    wide = {name: np.ones((9, 9), "f4") for name in pair}
    other = {name.replace("blocks.0.fc", "head"): values for name, values in pair.items()}
    for number, (further, kind) in enumerate(
        [(pair, "ok"), (one, "refused"), (wide, "refused"), (other, "refused")]
    ):
        for config in ({"plan": "*"}, {"plan": "*", "share": "A"}):
            answer = device.ask(
                "train", records({**start(4), **further}, config), run_id=100 + device.sent
            )
            assert answer.kind == kind, (number, config, answer)
    answer = device.ask("train", records({**start(4), **pair}, {}), RUN, run_id=99)
    assert answer.kind in ("ok", "refused", "failed")
