"""Checks whether two splits share a file or a record, by content and not by name.

Evaluating on a private record tells about it. So before a device evaluates, it checks that none of
these records is private.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_flwr.data.cached_file import require_writable
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.files import cache_folder, replace_file

if TYPE_CHECKING:
    from datasets import Dataset

_FORMAT = 2
_ROWS = 256


def check_files_apart(
    private: Iterable[Path], tests: Mapping[str, Iterable[Path]], private_name: str
) -> None:
    """Refuse test splits that hold a file of the private split.

    Parameters
    ----------
    private : Iterable[Path]
        Files of the private split.
    tests : Mapping[str, Iterable[Path]]
        Files of each test split by its name.
    private_name : str
        Name of the private split.

    Raises
    ------
    InvalidValue
        Two files have the same content. All of it is compared. Empty files do not count.
    """
    by_size: dict[int, list[Path]] = {}
    for path in private:
        by_size.setdefault(path.stat().st_size, []).append(path)
    digests: dict[Path, bytes] = {}
    for split, paths in tests.items():
        for path in paths:
            size = path.stat().st_size
            for other in by_size.get(size, ()) if size else ():
                if _file_digest(path, digests) == _file_digest(other, digests):
                    allowed = (
                        f"splits without private records, but its file {path.name!r} has the "
                        f"content of {other.name!r}, a file of the private split {private_name!r}"
                    )
                    raise InvalidValue("test-split", split, allowed)


def check_records_apart(
    private: Dataset,
    tests: Mapping[str, Dataset],
    columns: Sequence[str],
    private_name: str,
    fields: Collection[str] = (),
) -> None:
    """Refuse test splits that hold a private record.

    Two records are the same if all their inputs are the same text, or pictures with the same
    encoded bytes. Classes and other columns do not count, because a loss with another class also
    tells about the inputs. Splits that were compared before are recognized by their fingerprints.

    Parameters
    ----------
    private : Dataset
        The whole private split, as `fedlora_flwr.data.sources.load_split` returns it.
    tests : Mapping[str, Dataset]
        All of each test split by its name.
    columns : Sequence[str]
        Columns that the model reads; all splits have them.
    private_name : str
        Name of the private split.
    fields : Collection[str] (default: ())
        Fields of structures in these columns that the model reads; empty for all.

    Raises
    ------
    InvalidValue
        A record is in both, or the cache folder cannot be written to.
    """
    for split, test in tests.items():
        if not shared_records(private, test, columns, fields):
            continue
        pairs = _pairs(private, test, columns, fields)
        first, place = pairs[0]
        others = len({place for _, place in pairs}) - 1
        allowed = (
            f"splits without private records, but its record {place} is record {first} of the "
            f"private split {private_name!r} (counted from 0)"
            + (f", and {others} more are also in both" if others else "")
            + ". Remove them from one of the two splits"
        )
        raise InvalidValue("test-split", split, allowed)


def shared_records(
    private: Dataset, test: Dataset, columns: Sequence[str], fields: Collection[str] = ()
) -> int:
    """Return how many records of a private split are in a test split, too.

    Parameters are those of `check_records_apart`. A machine compares two splits once.

    Raises
    ------
    InvalidValue
        The cache folder cannot be written to.
    """
    known = _known_apart(private, test, columns, fields)
    if not known.exists():
        count = len(_pairs(private, test, columns, fields))
        require_writable(known.parent)
        replace_file(known, str(count).encode())
    return int(known.read_text(encoding="ascii"))


def shared_places(
    private: Dataset, test: Dataset, columns: Sequence[str], fields: Collection[str] = ()
) -> set[int]:
    """Return the positions in a test split of all records that a private split has, too.

    Parameters and errors are those of `shared_records`.
    """
    if not shared_records(private, test, columns, fields):
        return set()
    known = {*record_digests(private, columns, fields)}
    digests = enumerate(record_digests(test, columns, fields))
    return {place for place, digest in digests if digest in known}


def _pairs(
    private: Dataset, test: Dataset, columns: Sequence[str], fields: Collection[str]
) -> list[tuple[int, int]]:
    """Return the places of shared records: in the private split, and in the test split."""
    places: dict[bytes, int] = {}
    for place, digest in enumerate(record_digests(test, columns, fields)):
        places.setdefault(digest, place)
    return [
        (place, places[digest])
        for place, digest in enumerate(record_digests(private, columns, fields))
        if digest in places
    ]


def record_digests(
    dataset: Dataset, columns: Sequence[str], fields: Collection[str] = ()
) -> Iterator[bytes]:
    """Yield a hash, 16 bytes, of each record's values in some columns.

    Only one batch of records is in memory at a time. Different ways to store a value have the same
    hash: the order of fields does not matter, nor do fields without a value, whether a text is
    missing or empty, or whether a picture is in a table or a file. Parameters are those of
    `check_records_apart`.
    """
    import datasets

    read = dataset.with_format(None).select_columns(list(columns))
    for name in columns:
        if isinstance(read.features[name], datasets.Image):
            read = read.cast_column(name, datasets.Image(decode=False))
    for start in range(0, len(read), _ROWS):
        rows = read[start : start + _ROWS]
        for record in zip(*(rows[name] for name in columns), strict=True):
            found = hashlib.blake2b(digest_size=16)
            for value in record:
                content = _content(value, fields)
                found.update(len(content).to_bytes(8, "big"))
                found.update(content)
            yield found.digest()


def _content(value: Any, fields: Collection[str]) -> bytes:
    """Return a value as bytes, different ones for different values."""
    if value is None or value == "":
        return b""
    if isinstance(value, str):
        return b"t" + value.encode("utf-8", "surrogatepass")
    if isinstance(value, Mapping) and set(value) == {"bytes", "path"}:
        inside = value["bytes"]
        return b"p" + (Path(value["path"]).read_bytes() if inside is None else inside)
    return b"j" + json.dumps(_plain(value, fields), sort_keys=True, default=str).encode()


def _plain(value: Any, fields: Collection[str]) -> Any:
    """Leave out fields that are not read, and those without a value, which some files omit."""
    if isinstance(value, Mapping):
        return {
            key: _plain(each, fields)
            for key, each in value.items()
            if each not in (None, "") and (not fields or key in fields)
        }
    if isinstance(value, list | tuple):
        return [_plain(each, fields) for each in value]
    return value


def _known_apart(
    private: Dataset, test: Dataset, columns: Sequence[str], fields: Collection[str]
) -> Path:
    """Return the file with the number of records that two splits share, if it is known."""
    splits = [[split._fingerprint, len(split)] for split in (private, test)]
    parts = [_FORMAT, splits, list(columns), sorted(fields)]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    return cache_folder() / "datasets" / "apart" / key


def _file_digest(path: Path, known: dict[Path, bytes]) -> bytes:
    if path not in known:
        with path.open("rb") as stream:
            known[path] = hashlib.file_digest(stream, "sha256").digest()
    return known[path]
