"""Hook of MkDocs: pages that are outside docs/, such as the changelog and the examples.

Links in all pages are written for the repository. Those that lead out of docs/, and those of the
pages from outside, are turned into links of the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_NAMES = ("CHANGELOG", "CONTRIBUTING", "SECURITY", "CODE_OF_CONDUCT")
_EXAMPLES = sorted(path.parent.name for path in (ROOT / "examples").glob("*/README.md"))
_NOTEBOOKS = sorted(p.relative_to(ROOT) for p in (ROOT / "examples").glob("*/*.ipynb"))
_LANGUAGES = {".py": "python", ".toml": "toml"}
_LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]+)(#[^)\s]*)?\)")
# Where the site has what the repository has: from the repository's root to the root of the site.
PLACES = {
    **{f"{name}.md": f"{name.lower()}.md" for name in _NAMES},
    **{name: f"repository/{name}" for name in ("CITATION.cff", "LICENSE")},
    **{f"examples/{name}": f"examples/{name}.md" for name in _EXAMPLES},
    **{str(path): f"repository/{path}" for path in _NOTEBOOKS},
    "examples": "examples/index.md",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for source, page in PLACES.items():
        files.append(File.generated(config, page, content=content(source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Turn links of the repository into links of the site."""
    uri = page.file.src_uri
    return _LINK.sub(lambda link: f"]({site_link(link[1], uri)}{link[2] or ''})", markdown)


def site_link(link: str, uri: str) -> str:
    """Return where a link of a page leads on the site.

    Parameters
    ----------
    link : str
        As the page has it: relative to its place in the repository.
    uri : str
        The page, from the root of the site.
    """
    places = {page: source for source, page in PLACES.items()}
    source = places.get(uri, f"docs/{uri}")
    folder = source if (ROOT / source).is_dir() else posixpath.dirname(source)
    target = posixpath.normpath(posixpath.join(folder, link))
    found = PLACES.get(target.removesuffix("/README.md"))
    if found is None and uri in places and target.startswith("docs/"):
        found = target.removeprefix("docs/")
    return link if found is None else posixpath.relpath(found, posixpath.dirname(uri) or ".")


def content(source: str) -> str:
    """Return the text of a page that is outside docs/."""
    if source == "examples":
        return _list_of_examples()
    path = ROOT / source
    text = path.read_text("utf-8") if path.is_file() else _example(path)
    # It has every word of the project, and would be the first hit of every search.
    return f"---\nsearch:\n  exclude: true\n---\n{text}" if source == "CHANGELOG.md" else text


def _list_of_examples() -> str:
    rows = [f"- [{_title(ROOT / 'examples' / name)}]({name})" for name in _EXAMPLES]
    head = "# Examples\n\nEach is a complete small project. A test runs each as it is.\n\n"
    return head + "\n".join(rows) + "\n"


def _title(folder: Path) -> str:
    first = (folder / "README.md").read_text("utf-8").splitlines()[0]
    return first.removeprefix("# ")


def _example(folder: Path) -> str:
    """Return an example's page: what it says of itself, and its files."""
    parts = [(folder / "README.md").read_text("utf-8")]
    for path in sorted(folder.rglob("*")):
        text = path.read_text("utf-8").strip() if path.suffix in _LANGUAGES else ""
        if len(text.splitlines()) > 1:
            name = path.relative_to(folder)
            parts.append(f"## {name}\n\n```{_LANGUAGES[path.suffix]}\n{text}\n```\n")
    return "\n".join(parts)
