"""The documentation's blocks of code, and a shell that runs those of one page in one process."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.config import RunConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# A page whose text has no marks, and why its blocks are not run.
GIVEN = {
    "deployment.md": "tests/deploy/test_docs.py does",
}
NAMES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))

_BLOCK = re.compile(
    r"^(?:\s*<!-- (?P<mark>[^\n]*?) -->\n)?"
    r"(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.M | re.S,
)
_FILE = re.compile(r"# ([\w.]+\.(?:py|toml))\n")
_NUMBER = re.compile(r"\d[\d,.]*\d|\d")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    ``mark`` is what a comment above it says: ``"not run: REASON"``, ``"fails"`` or nothing.
    """

    page: str
    language: str
    text: str
    mark: str

    @property
    def not_run(self) -> str:
        """Why it is not run; empty if it is."""
        return self.mark.partition("not run: ")[2] or GIVEN.get(self.page, "")

    @property
    def commands(self) -> list[str]:
        """Its lines without comments, continued ones joined."""
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        bare = [re.sub(r"\s+#.*$|^#.*$", "", line) for line in lines]
        return [line for line in bare if line]


def blocks(page: str) -> list[Block]:
    """Return a page's blocks in their order."""
    text = (DOCS / page).read_text("utf-8")
    return [
        Block(page, found["language"], textwrap.dedent(found["text"]), found["mark"] or "")
        for found in _BLOCK.finditer(text)
    ]


class Shell:
    """Runs blocks in one folder and one process, and keeps what the last one printed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.printed = folder, ""
        self.names: dict[str, Any] = {}

    def follow(self, page: str) -> None:
        """Do what a page says."""
        before = set(sys.modules)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.syspath_prepend(str(self.folder))
            patch.setenv("XDG_DATA_HOME", str(self.folder / "data"))
            for block in blocks(page):
                if not block.not_run:
                    self.do(block)
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(self.folder)):
                del sys.modules[name]

    def do(self, block: Block) -> None:
        """Run one block; a text is what the block before it prints."""
        if block.language == "text":
            missing = [line for line in block.text.splitlines() if not self.has_printed(line)]
            assert missing == [], f"{block.page} shows what is not printed:\n{self.printed}"
        elif named := _FILE.match(block.text):
            (self.folder / named[1]).write_text(block.text, encoding="utf-8")
        elif block.language == "toml":
            RunConfig.of(tomllib.loads(block.text))
        elif block.language == "python":
            exec(compile(block.text, block.page, "exec"), self.names)
        else:
            done = [self.call(command) for command in block.commands]
            self.printed = "\n".join(printed for _, printed in done)
            wrong = [code for code, _ in done if bool(code) != (block.mark == "fails")]
            assert not wrong, f"{block.page}: {block.text}{self.printed}"

    def call(self, command: str) -> tuple[int, str]:
        """Return a command's exit code and all that it printed."""
        program, *rest = shlex.split(command)
        if program == "fedlora":
            result = CliRunner().invoke(app, rest)
            return result.exit_code, result.output
        if program == "python":
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                runpy.run_path(rest[0], run_name="__main__")
            return 0, printed.getvalue()
        done = subprocess.run(
            ["bash", "-ec", command], cwd=self.folder, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    def has_printed(self, line: str) -> bool:
        """Tell whether a line was printed; figures may differ, and … stands for anything."""
        parts = (re.escape(_NUMBER.sub("0", part)) for part in re.sub(r" +", " ", line).split("…"))
        printed = _NUMBER.sub("0", re.sub(r" +", " ", self.printed))
        return re.search("^ ?" + ".*".join(parts), printed, re.M) is not None
