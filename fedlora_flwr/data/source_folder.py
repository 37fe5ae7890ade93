"""The folder of a data set; links and paths that lead out of it are refused."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fedlora_flwr.errors import InvalidValue


@dataclass(frozen=True)
class SourceFolder:
    """A folder whose content is read, and nothing outside it.

    Links are followed if they stay in the folder. In the cache of the hub's client, files are
    links to the folder ``blobs`` of the same data set, which counts as inside.

    Parameters
    ----------
    path : Path
        The folder as the user named it.
    roots : tuple[Path, ...]
        Resolved folders that may hold content.
    """

    path: Path
    roots: tuple[Path, ...]

    @classmethod
    def of(cls, path: Path) -> SourceFolder:
        """Make it from a folder, or from a file inside the folder."""
        own = path.resolve()
        kept = [each.parent / "blobs" for each in own.parents if each.name == "snapshots"]
        roots = [own if own.is_dir() else own.parent, *(each for each in kept if each.is_dir())]
        return cls(path, tuple(roots))

    def inner(self, name: str) -> Path:
        """Return a subfolder by its relative path; an empty path means this folder.

        Raises
        ------
        InvalidValue
            The path leads out of this folder, or no such folder exists.
        """
        try:
            inner = self.path / name
            if not Path(name).is_absolute() and self._holds(inner) and inner.is_dir():
                return inner
        except (OSError, ValueError):  # A name that no file can have.
            pass
        raise InvalidValue("subset", name, f"empty, or a folder inside {str(self.path)!r}")

    def entries(self, folder: Path) -> list[Path]:
        """Return the entries of a subfolder, sorted by name, without hidden entries.

        Raises
        ------
        InvalidValue
            An entry is a link to a place outside this folder.
        """
        found = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = folder / entry.name
                if entry.is_symlink() and not self._holds(path):
                    allowed = (
                        f"a complete folder, but {entry.name!r} is a link to a place outside it. "
                        "Copy the content, or name that place itself"
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
