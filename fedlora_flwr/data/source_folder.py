"""The folder of a data set, out of which nothing leads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fedlora_flwr.errors import InvalidValue


@dataclass(frozen=True)
class SourceFolder:
    """A folder whose content is read, and nothing outside it.

    Links are followed where they stay in the folder. In a copy that the hub's client keeps, files
    are links to the folder ``blobs`` of the same data set, which counts as inside.

    Parameters
    ----------
    path : Path
        The folder as it was named.
    roots : tuple[Path, ...]
        Resolved folders that content may be in.
    """

    path: Path
    roots: tuple[Path, ...]

    @classmethod
    def of(cls, path: Path) -> SourceFolder:
        """Make one of a folder, or of the folder that a file is in."""
        own = path.resolve()
        kept = [each.parent / "blobs" for each in own.parents if each.name == "snapshots"]
        roots = [own if own.is_dir() else own.parent, *(each for each in kept if each.is_dir())]
        return cls(path, tuple(roots))

    def inner(self, name: str) -> Path:
        """Return a folder in this one by its relative path; empty for this one.

        Raises
        ------
        InvalidValue
            It leads out of this folder, or is not there.
        """
        try:
            inner = self.path / name
            if not Path(name).is_absolute() and self._holds(inner) and inner.is_dir():
                return inner
        except (OSError, ValueError):  # A name that no file can have.
            pass
        raise InvalidValue("subset", name, f"empty, or a folder inside {str(self.path)!r}")

    def entries(self, folder: Path) -> list[Path]:
        """Return what is in a folder of this one, sorted by name, without hidden entries.

        Raises
        ------
        InvalidValue
            An entry is a link to a place outside.
        """
        found = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = folder / entry.name
                if entry.is_symlink() and not self._holds(path):
                    allowed = (
                        f"a folder that is complete: {entry.name!r} is a link to a place outside "
                        "it. Copy the content, or name that place itself"
                    )
                    raise InvalidValue("dataset", str(self.path), allowed)
                found.append(path)
        return sorted(found)

    def _holds(self, path: Path) -> bool:
        try:
            target = path.resolve()
        except RuntimeError:  # A link to itself.
            return False
        return any(target.is_relative_to(root) for root in self.roots)
