"""Finds the splits in a file or folder of records by the names of its files and folders."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from fedlora_flwr.data.source_folder import SourceFolder
from fedlora_flwr.errors import InvalidValue

TABLES = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
}
IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")
_CARDS = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
_VALIDATION = ("validation", "val", "valid", "dev")
_KNOWN = ("train", "test", *_VALIDATION)


@dataclass(frozen=True)
class Found:
    """Where the records of one split are.

    Parameters
    ----------
    kind : str
        ``"parquet"``, ``"csv"``, ``"json"``, ``"images"`` (a folder of class folders) or
        ``"saved"`` (a folder made by ``Dataset.save_to_disk``).
    paths : tuple[Path, ...]
        Files in order, or one folder.
    source : SourceFolder
        The folder that contains all of them.
    """

    kind: str
    paths: tuple[Path, ...]
    source: SourceFolder


def find_splits(path: Path, source: SourceFolder) -> dict[str, Found]:
    """Return the splits at ``path``, which is in ``source``, by name.

    A file is one split: the one that it is named for (``test.csv``), or ``train``. In a folder a
    split is a file ``<split>.<type>``, its shards ``<split>-00000-of-00002.<type>``, a folder
    ``<split>/<class>/`` of pictures, or a saved data set. If there is none, the folder ``data`` in
    it is searched.

    Raises
    ------
    InvalidValue
        Shards are missing, a split exists in two types, or a link leads out of the source.
    """
    if path.is_file():
        kind = TABLES.get(path.suffix.lower())
        return {_split_of(path): Found(kind, (path,), source)} if kind else {}
    entries = source.entries(path)
    if (path / "state.json").is_file():
        return {_saved_name(path): Found("saved", (path,), source)}
    folders, tables = _folders(entries, source), _tables(entries, source)
    if both := sorted(folders.keys() & tables.keys()):
        allowed = f"each split once, but {both[0]!r} is there as a folder and as a file"
        raise InvalidValue("dataset", str(path), allowed)
    found = {**folders, **tables}
    inner = path / "data"
    return found if found or inner not in entries else find_splits(inner, source)


def pick(splits: dict[str, Found], split: str) -> Found | None:
    """Return a split by name; ``validation``, ``val``, ``valid`` and ``dev`` are one name."""
    if split in splits:
        return splits[split]
    others = [name for name in _VALIDATION if name in splits] if split in _VALIDATION else []
    return splits[others[0]] if len(others) == 1 else None


def folder_as_table(path: Path, split: str) -> Path | None:
    """Return a folder that is named like a table and is where a split's table should be."""
    inside = [path / f"{split}{ending}" for ending in TABLES]
    for place in (path, *inside):
        if place.suffix.lower() in TABLES and place.is_dir():
            return place
    return None


def class_names(found: Found) -> list[str]:
    """Return the class folders of a split of pictures and of the splits beside it, sorted.

    Classes have the same numbers in all splits, even if one split lacks a class.
    """
    source, (folder,) = found.source, found.paths
    beside = [entry for entry in source.entries(folder.parent) if entry.is_dir()]
    splits = {split: {entry.name for entry in _classes(split, source)} for split in beside}
    for (one, first), (other, second) in combinations(splits.items(), 2):
        spelt = {_spelling(name): name for name in first - second}
        for name in sorted(second - first):
            if (same := spelt.get(_spelling(name))) is not None:
                allowed = (
                    f"one spelling of each class, but {one.name!r} has a folder {same!r} and "
                    f"{other.name!r} has {name!r}. Rename one of them"
                )
                raise InvalidValue("dataset", str(folder.parent), allowed)
    return sorted(set().union(*splits.values()))


def _spelling(name: str) -> str:
    """Return a name in one case and one of Unicode's forms, which file systems may change."""
    return unicodedata.normalize("NFC", name).casefold()


def pictures(folder: Path, source: SourceFolder) -> Iterator[Path]:
    """Return the picture files of a class folder, by name."""
    return (entry for entry in source.entries(folder) if entry.suffix.lower() in IMAGES)


def strangers(found: Found) -> list[str]:
    """Return sentences about files in a split of pictures that are not read.

    These are files outside class folders, in folders inside class folders, hidden, or of another
    type than `IMAGES`. Class folders without a picture are also told.
    """
    (folder,) = found.paths
    passed: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in place.parts)
        if path.is_dir():
            if (
                len(place.parts) == 1
                and not hidden
                and not next(pictures(path, found.source), None)
            ):
                passed.setdefault("class folders without a picture", []).append(str(place))
        elif hidden:
            if path.suffix.lower() in IMAGES:
                passed.setdefault("hidden pictures, which are not read", []).append(str(place))
        elif path.suffix.lower() not in IMAGES:
            passed.setdefault("files that are not pictures by their names", []).append(str(place))
        elif len(place.parts) != 2:
            passed.setdefault(
                "pictures not directly in a class folder, which are not read", []
            ).append(str(place))
    return [f"{what}: {len(names)}, e.g. {names[0]!r}" for what, names in passed.items()]


def _tables(entries: list[Path], source: SourceFolder) -> dict[str, Found]:
    groups: dict[str, list[Path]] = {}
    for entry in entries:
        if entry.is_file() and entry.suffix.lower() in TABLES and entry.name not in _CARDS:
            shard = _SHARD.fullmatch(entry.stem)
            groups.setdefault(shard["split"] if shard else entry.stem, []).append(entry)
    return {split: _table(paths, source) for split, paths in groups.items()}


def _table(paths: list[Path], source: SourceFolder) -> Found:
    """Check that files are all parts of one table."""
    first = paths[0]
    shards = [_SHARD.fullmatch(path.stem) for path in paths]
    numbers = [int(shard["number"]) for shard in shards if shard]
    counts = {shard["count"] if shard else "00001" for shard in shards}
    if len({path.suffix for path in paths}) > 1 or (len(paths) > 1 and len(numbers) < len(paths)):
        names = ", ".join(path.name for path in paths)
        raise InvalidValue(
            "dataset", str(first.parent), f"one file or one set of shards per split, not {names}"
        )
    if numbers and (len(counts) > 1 or numbers != list(range(int(min(counts))))):
        raise InvalidValue("dataset", str(first.parent), f"all shards of {first.name}")
    return Found(TABLES[first.suffix.lower()], tuple(paths), source)


def _folders(entries: list[Path], source: SourceFolder) -> dict[str, Found]:
    found = {}
    for entry in entries:
        if (entry / "state.json").is_file():
            source.entries(entry)
            found[entry.name] = Found("saved", (entry,), source)
        elif entry.is_dir() and _classes(entry, source):
            found[entry.name] = Found("images", (entry,), source)
    return found


def _classes(folder: Path, source: SourceFolder) -> list[Path]:
    """Return the class folders of a folder; none if no folder in it holds a picture."""
    inner = [entry for entry in source.entries(folder) if entry.is_dir()]
    return inner if any(next(pictures(entry, source), None) for entry in inner) else []


def _split_of(path: Path) -> str:
    shard = _SHARD.fullmatch(path.stem)
    if shard and int(shard["count"]) > 1:
        allowed = "the folder of all shards, because this file is only one of them"
        raise InvalidValue("dataset", str(path), allowed)
    name = shard["split"] if shard else path.stem
    return name if name in _KNOWN else "train"


def _saved_name(folder: Path) -> str:
    return folder.name if folder.name in _KNOWN else "train"
