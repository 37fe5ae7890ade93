"""Which splits a file or folder of records holds, by the names in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
    """

    kind: str
    paths: tuple[Path, ...]


def find_splits(path: Path) -> dict[str, Found]:
    """Return the splits at ``path`` by name.

    A file is one split: the one that its name says (``test.csv``), or ``train``. In a folder a
    split is a file ``<split>.<type>``, its shards ``<split>-00000-of-00002.<type>``, a folder
    ``<split>/<class>/`` of pictures or a saved data set; where there is none the folder ``data``
    in it is searched.

    Raises
    ------
    InvalidValue
        Shards are missing, or a split is there in two types.
    """
    if path.is_file():
        kind = TABLES.get(path.suffix.lower())
        return {_split_of(path): Found(kind, (path,))} if kind else {}
    if (path / "state.json").is_file():
        return {_saved_name(path): Found("saved", (path,))}
    found = {**_folders(path), **_tables(path)}
    inner = path / "data"
    return found if found or not inner.is_dir() else find_splits(inner)


def pick(splits: dict[str, Found], split: str) -> Found | None:
    """Return a split by name; ``validation``, ``val``, ``valid`` and ``dev`` are one name."""
    if split in splits:
        return splits[split]
    others = [name for name in _VALIDATION if name in splits] if split in _VALIDATION else []
    return splits[others[0]] if len(others) == 1 else None


def class_names(folder: Path) -> list[str]:
    """Return the class folders of a split and of the splits beside it, sorted.

    A class that one split lacks has its number in all.
    """
    beside = [entry for entry in _visible(folder.parent) if entry.is_dir() and _classes(entry)]
    return sorted({entry.name for split in beside for entry in _classes(split)})


def pictures(folder: Path) -> Iterator[Path]:
    """Return the picture files of a class folder, by name."""
    return (entry for entry in _visible(folder) if entry.suffix.lower() in IMAGES)


def _tables(folder: Path) -> dict[str, Found]:
    groups: dict[str, list[Path]] = {}
    for entry in _visible(folder):
        if entry.is_file() and entry.suffix.lower() in TABLES and entry.name not in _CARDS:
            shard = _SHARD.fullmatch(entry.stem)
            groups.setdefault(shard["split"] if shard else entry.stem, []).append(entry)
    return {split: _table(paths) for split, paths in groups.items()}


def _table(paths: list[Path]) -> Found:
    """Check that files are one table, whole."""
    first = paths[0]
    shards = [_SHARD.fullmatch(path.stem) for path in paths]
    numbers = [int(shard["number"]) for shard in shards if shard]
    counts = {shard["count"] if shard else "00001" for shard in shards}
    if len({path.suffix for path in paths}) > 1 or (len(paths) > 1 and len(numbers) < len(paths)):
        names = ", ".join(path.name for path in paths)
        raise InvalidValue(
            "source", str(first.parent), f"one file, or shards, a split, not {names}"
        )
    if numbers and (len(counts) > 1 or numbers != list(range(int(min(counts))))):
        raise InvalidValue("source", str(first.parent), f"all shards of {first.name}")
    return Found(TABLES[first.suffix.lower()], tuple(paths))


def _folders(folder: Path) -> dict[str, Found]:
    found = {}
    for entry in _visible(folder):
        if (entry / "state.json").is_file():
            found[entry.name] = Found("saved", (entry,))
        elif entry.is_dir() and _classes(entry):
            found[entry.name] = Found("images", (entry,))
    return found


def _classes(folder: Path) -> list[Path]:
    """Return the class folders of a folder, or none where no folder in it holds a picture."""
    inner = [entry for entry in _visible(folder) if entry.is_dir()]
    return inner if any(next(pictures(entry), None) for entry in inner) else []


def _split_of(path: Path) -> str:
    shard = _SHARD.fullmatch(path.stem)
    if shard and int(shard["count"]) > 1:
        allowed = "the folder of all shards, as this file is one of several"
        raise InvalidValue("source", str(path), allowed)
    name = shard["split"] if shard else path.stem
    return name if name in _KNOWN else "train"


def _saved_name(folder: Path) -> str:
    return folder.name if folder.name in _KNOWN else "train"


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
