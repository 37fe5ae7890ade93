from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlora_flwr.clients.local_store import LocalStore
from fedlora_flwr.errors import InvalidValue

B = "blocks.0.attn.qkv.lora_B.weight"
ARRAYS = {
    B: np.arange(6, dtype=np.float32).reshape(3, 2),
    "head.bias": np.array([0.1, -0.0, 3e38], np.float32),
    "empty": np.zeros((4, 0), np.float32),
}


def same(found: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]]) -> bool:
    return {n: (a.dtype, a.shape, a.tobytes()) for n, a in found.items()} == {
        n: (a.dtype, a.shape, a.tobytes()) for n, a in expected.items()
    }


def test_what_is_kept_comes_back_in_its_bits_from_another_object(tmp_path: Path) -> None:
    LocalStore(tmp_path / "deep" / "local").keep("client", "run", ARRAYS)
    assert same(LocalStore(tmp_path / "deep" / "local").recall("client", "run"), ARRAYS)


def test_the_layout_in_memory_does_not_matter(tmp_path: Path) -> None:
    store, wide = LocalStore(tmp_path), np.arange(12, dtype=np.float32).reshape(3, 4)
    store.keep("client", "run", {"turned": wide.T, "strided": wide[:, ::2]})
    found = store.recall("client", "run")
    np.testing.assert_array_equal(found["turned"], wide.T)
    np.testing.assert_array_equal(found["strided"], wide[:, ::2])


def test_nothing_is_there_before_the_first_time(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "local")
    assert store.recall("client", "run") == {}
    assert not (tmp_path / "local").exists()


def test_the_last_arrays_replace_all_earlier_ones(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.keep("client", "run", ARRAYS)
    store.keep("client", "run", {B: ARRAYS[B] + 1})
    assert same(store.recall("client", "run"), {B: ARRAYS[B] + 1})
    assert len(list(tmp_path.iterdir())) == 1


def test_what_was_recalled_may_be_overwritten(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.keep("client", "run", ARRAYS)
    store.recall("client", "run")[B][:] = 7
    assert same(store.recall("client", "run"), ARRAYS)


texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(one=st.tuples(texts, texts), other=st.tuples(texts, texts))
def test_any_two_clients_or_runs_have_files_of_their_own_in_the_folder(
    one: tuple[str, str], other: tuple[str, str]
) -> None:
    store = LocalStore(Path("local"))
    assert (store.path(*one) == store.path(*other)) == (one == other)
    assert store.path(*one).parent == Path("local")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", "bc"), ("ab", "c")),
        (("1:a", "b"), ("1", ":ab")),
        (("2", "run"), ("", "2run")),
        (("../a", "b"), ("a", "b")),
        (("partition-000001", "1"), ("partition-00000", "11")),
    ],
)
def test_clients_and_runs_that_spell_alike_are_told_apart(
    one: tuple[str, str], other: tuple[str, str], tmp_path: Path
) -> None:
    store = LocalStore(tmp_path / "local")
    store.keep(*one, ARRAYS)
    assert store.recall(*other) == {}
    store.keep(*other, {B: ARRAYS[B] * 2})
    assert same(store.recall(*one), ARRAYS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["local"]


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\xff" * 64])
def test_a_damaged_file_is_refused_by_its_path(content: bytes, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.path("client", "run").write_bytes(content)
    with pytest.raises(InvalidValue, match="readable safetensors") as caught:
        store.recall("client", "run")
    assert str(store.path("client", "run")) in str(caught.value)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.keep("client", "run", ARRAYS)
    path = store.path("client", "run")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InvalidValue, match="local arrays"):
        store.recall("client", "run")


def test_what_is_kept_is_its_owners_alone(tmp_path: Path) -> None:
    folder, umask = tmp_path / "local", os.umask(0)
    try:
        LocalStore(folder).keep("client", "run", ARRAYS)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
