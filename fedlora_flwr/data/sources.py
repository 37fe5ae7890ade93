"""Records from local files or from the Hugging Face hub, as memory-mapped data sets."""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora_flwr.data.csv_files import csv_tables
from fedlora_flwr.data.fingerprint import files_digest
from fedlora_flwr.data.given import given_split
from fedlora_flwr.data.hub import hub_answers
from fedlora_flwr.data.json_files import json_tables
from fedlora_flwr.data.local_files import (
    TABLES,
    Found,
    class_names,
    find_splits,
    folder_as_table,
    pick,
    pictures,
    strangers,
)
from fedlora_flwr.data.parquet_files import parquet_tables
from fedlora_flwr.data.prepared import kept
from fedlora_flwr.data.source_folder import SourceFolder
from fedlora_flwr.errors import InvalidValue, unknown
from fedlora_flwr.files import cache_folder
from fedlora_flwr.places import held, is_held

if TYPE_CHECKING:
    from datasets import Dataset

_HUB_NAME = re.compile(r"[A-Za-z0-9](?!.*\.\.)[\w.-]*(/\w[\w.-]*)?", re.ASCII)
# The hub's library would take other names for paths, or for sums and slices of splits.
_HUB_SUBSET, _HUB_SPLIT = re.compile(r"(\w[^/\\]*)?"), re.compile(r"(?!all$)\w[\w.-]*")
_PICTURE = frozenset({"bytes", "path"})
# In CSV files on the hub, the library would read words such as None and NA as missing.
_CSV_WORDS = {"keep_default_na": False, "na_values": [""]}
# Marks a data set, in its info, if its classes are the class folders that were found.
CLASS_FOLDERS = "class-folders"
_READERS = {"csv": csv_tables, "json": json_tables, "parquet": parquet_tables}
# Change it whenever the rules for reading tables change, so that no older copy is used.
_RULES = "1"
_LOCAL = "a local file or folder (parquet, CSV, JSON, JSON lines, class folders of pictures)"


def load_split(source: str, split: str, *, subset: str = "") -> Dataset:
    """Open one split of a data set.

    Local tables are read once into an Arrow copy in the cache folder, which is named by a hash of
    their content and memory-mapped. A changed file is read again. Pictures stay encoded until a
    record is read. Pictures in class folders are not copied, and their labels number the sorted
    class names of all splits of the folder.

    Parameters
    ----------
    source : str
        A file, or a folder as for `fedlora_flwr.data.local_files.find_splits`; or the name of a
        data set on the hub.
    split : str
        Name of the split, e.g. ``"train"``.
    subset : str (default: "")
        A folder in the source, or the hub's name of a configuration.

    Returns
    -------
    Dataset
        At least one record, in the order of the files. Its fingerprint is a hash of the content.

    Raises
    ------
    InvalidValue
        The source, split or subset does not exist, cannot be read or has no records; or a name or a
        link leads out of the source.
    """
    path = _existing(source)
    if is_held(source):
        dataset = given_split(held("dataset", source), split)
    elif path is not None:
        dataset = _read(_found(path, source, split, subset), split)
    elif is_hub_name(source):
        dataset = _from_hub(source, split, subset)
    else:
        raise InvalidValue("dataset", source, f"{_LOCAL} that exists, or a name on the hub")
    if len(dataset) == 0:
        raise InvalidValue("split", split, f"a split of {source!r} with records")
    return dataset


def split_names(source: str) -> list[str]:
    """Return the names of the splits of a local file or folder.

    Raises
    ------
    InvalidValue
        There is no such file or folder, or no records are in it.
    """
    path = _existing(source)
    splits = {} if path is None else find_splits(path, SourceFolder.of(path))
    if not splits:
        raise InvalidValue("data", source, f"{_LOCAL} that exists")
    return list(splits)


def split_files(source: str, split: str, *, subset: str = "") -> tuple[Path, ...]:
    """Return the files of a local split's table; none for pictures and names on the hub.

    Parameters and errors are those of `load_split`.
    """
    path = _existing(source)
    if path is None:
        return ()
    found = _found(path, source, split, subset)
    if found.kind == "saved":
        return tuple(sorted(found.paths[0].glob("*.arrow")))
    return () if found.kind == "images" else found.paths


def passed_over(source: str, split: str, *, subset: str = "") -> list[str]:
    """Return sentences about files in a local split of pictures that are not read.

    Parameters and errors are those of `load_split`.
    """
    path = _existing(source)
    found = None if path is None else _found(path, source, split, subset)
    return strangers(found) if found and found.kind == "images" else []


def is_hub_name(source: str) -> bool:
    """Tell whether a source that is not on this machine may be a data set on the hub."""
    return bool(_HUB_NAME.fullmatch(source)) and Path(source).suffix.lower() not in TABLES


def _existing(source: str) -> Path | None:
    try:
        path = Path(source).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # A name that no file or home folder can have.
        return None


def _found(path: Path, source: str, split: str, subset: str) -> Found:
    whole = SourceFolder.of(path)
    root = whole.inner(subset) if subset else path
    try:
        splits = find_splits(root, whole)
    except OSError as error:
        raise _unreadable(source, error) from error
    found = pick(splits, split)
    if found is None and (folder := folder_as_table(root, split)):
        raise InvalidValue(
            "dataset", str(folder), "a file, but it is a folder. Name the file in it"
        )
    if not splits:
        raise InvalidValue("dataset", source, _LOCAL)
    if found is None:
        raise unknown("split", split, splits, after=f", the splits of {source!r}")
    return found


def _read(found: Found, split: str) -> Dataset:
    import datasets

    readers = {"images": _read_pictures, "saved": _read_saved}
    try:
        with _screen():
            dataset, digest = readers.get(found.kind, _read_table)(found)
    except InvalidValue:
        raise
    except Exception as error:
        # Saved data sets and file systems raise errors of many types.
        raise _unreadable(_named(found), error) from error
    dataset = _with_images(dataset)
    _require_pictures_inside(dataset, found)
    fingerprint = datasets.fingerprint.Hasher.hash([digest, split, str(dataset.features)])
    info = dataset.info.copy()
    info.dataset_name = _named(found)
    return datasets.Dataset(
        dataset.data,
        info=info,
        split=dataset.split,
        indices_table=dataset._indices,
        fingerprint=fingerprint,
    )


def _read_table(found: Found) -> tuple[Dataset, str]:
    # The copy depends on the files' content and on the rules for reading them.
    digest = f"{_RULES}-{files_digest(found.paths, found.paths[0].parent)}"
    name = hashlib.sha256(digest.encode()).hexdigest()[:32]
    read = partial(_READERS[found.kind], found.paths)
    dataset = kept(cache_folder() / "datasets" / "sources" / name, read)
    if dataset is None:
        raise InvalidValue("dataset", _named(found), "records, but it has none")
    return dataset, digest


def _named(found: Found) -> str:
    """Name the files that a split is in."""
    others = len(found.paths) - 1
    return f"{found.paths[0]}{f' and {others} more' if others else ''}"


def _read_saved(found: Found) -> tuple[Dataset, str]:
    import datasets

    (folder,) = found.paths
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if any(Path(file["filename"]).name != file["filename"] for file in state["_data_files"]):
        raise InvalidValue("dataset", str(folder), "a saved data set whose files are all in it")
    dataset = datasets.load_from_disk(str(folder))
    return dataset, files_digest(folder.glob("*"), folder)


def _read_pictures(found: Found) -> tuple[Dataset, str]:
    import datasets
    import pyarrow as pa

    (folder,) = found.paths
    names = class_names(found)
    files = [
        (file, number)
        for number, name in enumerate(names)
        if (folder / name).is_dir()
        for file in pictures(folder / name, found.source)
    ]
    paths, labels = [file for file, _ in files], [label for _, label in files]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    empty = pa.nulls(len(paths), pa.binary())
    texts = pa.array([str(path.absolute()) for path in paths], pa.string())
    images = pa.StructArray.from_arrays([empty, texts], names=["bytes", "path"])
    table = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
    info = datasets.DatasetInfo(features=features, builder_name=CLASS_FOLDERS)
    dataset = datasets.Dataset(table, info=info)
    return dataset, files_digest(paths, folder) + str(names)


def _with_images(dataset: Dataset) -> Dataset:
    """Mark columns of encoded pictures, which plain parquet files do not mark."""
    import datasets

    for name in dataset.column_names:
        if (content := _first_content(dataset, name)) and _is_picture(content):
            dataset = dataset.cast_column(name, datasets.Image())
    return dataset


def _first_content(dataset: Dataset, name: str) -> bytes:
    """Return the first value of a column of bytes, or of structures with a field of bytes."""
    import datasets
    import pyarrow.compute as pc

    feature = dataset.features[name]
    inside = isinstance(feature, dict) and "bytes" in feature and set(feature) <= _PICTURE
    if inside or feature in (datasets.Value("binary"), datasets.Value("large_binary")):
        for chunk in dataset.data.table.column(name).chunks:
            content = pc.struct_field(chunk, "bytes") if inside else chunk
            if len(held := content.drop_null()):
                found = held[0].as_py()
                return found if isinstance(found, bytes) else b""
    return b""


def _require_pictures_inside(dataset: Dataset, found: Found) -> None:
    """Refuse tables with paths or addresses of pictures, which decoding would open."""
    import datasets
    import pyarrow.compute as pc

    if found.kind == "images":
        return
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            column = dataset.data.table.column(name)
            content, path = (pc.struct_field(column, part) for part in ("bytes", "path"))
            if pc.any(pc.and_(pc.is_null(content), pc.is_valid(path))).as_py():
                allowed = f"pictures in the file itself, but column {name!r} only names some"
                raise InvalidValue("dataset", str(found.paths[0]), allowed)


def _is_picture(content: bytes) -> bool:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)):
            return True
    except UnidentifiedImageError:
        return False


def _from_hub(name: str, split: str, subset: str) -> Dataset:
    from datasets import config

    for key, value, pattern in (("subset", subset, _HUB_SUBSET), ("split", split, _HUB_SPLIT)):
        if not pattern.fullmatch(value):
            raise InvalidValue(key, value, f"the plain name of a {key} of {name!r}")
    if not config.HF_HUB_OFFLINE and not hub_answers():
        reason = (
            f"{_LOCAL}, or a name on a hub that can be reached: it did not answer. To use a copy "
            "that was downloaded before, set HF_HUB_OFFLINE=1"
        )
        raise InvalidValue("dataset", name, reason)
    return _fetched(name, split, subset)


def _fetched(name: str, split: str, subset: str) -> Dataset:
    import datasets

    try:
        with _screen():
            found = datasets.load_dataset(name, subset or None, split=split)
            if found.builder_name == "csv":
                found = datasets.load_dataset(name, subset or None, split=split, **_CSV_WORDS)
            return found
    except ValueError as error:
        text = " ".join(str(error).split())
        if text.startswith("Unknown split"):
            raise InvalidValue("split", split, f"a split of {name!r} ({text})") from error
        if "BuilderConfig" in text or "Config name is missing" in text:
            raise InvalidValue("subset", subset, f"a subset of {name!r} ({text})") from error
        raise _unreadable(name, error) from error
    except Exception as error:
        # The library's text says whether the name, access, the network or the disk is the cause.
        raise _unreadable(name, error) from error


def _unreadable(source: str, error: Exception) -> InvalidValue:
    cause = error.__cause__ or error
    text = " ".join(str(cause).split())[:300]
    return InvalidValue("dataset", source, f"records that can be read ({text})")


@contextmanager
def _screen() -> Iterator[None]:
    """Silence the library's messages, which repeat its errors, and its bars outside a terminal."""
    import datasets
    from datasets.utils import logging as library

    level, hide = library.get_verbosity(), not sys.stderr.isatty()
    hide = hide and not datasets.are_progress_bars_disabled()
    library.set_verbosity(library.CRITICAL)
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if hide:
            datasets.enable_progress_bars()
