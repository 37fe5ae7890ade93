"""What the site adds to the pages: lists from the code, links out of docs/, and readable tables."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import fedlora_flwr
from fedlora_flwr.cli import app
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.keys import fields_by_key
from fedlora_flwr.config.methods import settings_of_methods
from tests.docs.pages import DOCS, NAMES, ROOT
from website import commonmark, filled_in, outside_pages, wide_tables


def test_every_key_is_in_the_reference_once() -> None:
    shown = re.findall(r"^\| `([\w-]+)` \|", filled_in.configuration(), re.M)
    own = settings_of_methods(fields_by_key(RunConfig))
    assert sorted(shown) == sorted(
        [*RunConfig().items(), *(name.split(".")[-1] for name, _ in own)]
    )
    assert "| `epsilon` | `8.0` | privacy budget of each client; inf = no noise |" in (
        filled_in.configuration()
    )


def test_every_command_is_in_the_reference_with_its_options() -> None:
    shown = filled_in.commands()
    every: Any = get_command(app)
    top = {name for name in every.commands if name != "deploy"}
    titles = set(re.findall(r"^### fedlora (.*)$", shown, re.M))
    assert titles == top | {
        f"deploy {name}"
        for name in ("init", "check", "status", "renew", "run", "start", "serve", "identity")
    }
    assert (
        "| `--workers INTEGER` | Processes that serve clients; 1 = this one. Default: `1`. |"
        in (shown)
    )


def test_the_four_tiers_are_the_public_names() -> None:
    tiers = ("RUNS", "STRATEGIES", "CLIENT_AND_ENGINE", "BLOCKS")
    shown = re.findall(
        r"^::: fedlora_flwr\.\S+\.(\w+)$", "\n\n".join(map(filled_in.names, tiers)), re.M
    )
    assert sorted([*shown, "__version__"]) == sorted(fedlora_flwr.__all__)


@pytest.mark.parametrize("mark", filled_in.LISTS)
def test_a_mark_is_on_one_page(mark: str) -> None:
    assert [mark in (DOCS / page).read_text("utf-8") for page in NAMES].count(True) == 1


@pytest.mark.parametrize(
    ("link", "page", "leads"),
    [
        ("../CHANGELOG.md", "versions.md", "changelog.md"),
        ("../../CITATION.cff", "how_to/cite_epsilon.md", "../repository/CITATION.cff"),
        ("../examples/legacy", "drop_in.md", "examples/legacy.md"),
        ("../../examples/own_method", "how_to/add_a_strategy.md", "../examples/own_method.md"),
        ("docs/versions.md", "changelog.md", "versions.md"),
        ("SECURITY.md", "contributing.md", "security.md"),
        ("../../docs/drop_in.md", "examples/hf_trainer.md", "../drop_in.md"),
        ("../message_api", "examples/private_loop.md", "message_api.md"),
        ("legacy", "examples/index.md", "legacy.md"),
        ("privacy.md", "index.md", "privacy.md"),
    ],
)
def test_links_of_the_repository_lead_to_pages_of_the_site(
    link: str, page: str, leads: str
) -> None:
    assert outside_pages.site_link(link, page) == leads


def test_a_page_of_an_example_shows_all_of_its_code() -> None:
    page = outside_pages.content("examples/own_method")
    for name in ("pyproject.toml", "server_momentum/strategy.py"):
        assert f"## {name}" in page
        assert (ROOT / "examples/own_method" / name).read_text("utf-8").strip() in page


def test_lists_of_commonmark_become_lists_of_python_markdown() -> None:
    text = "Two:\n- one\n- two\n\nThen:\n\n1. Do\n\n   ```sh\n   a\n   ```\n\n   More.\n2. End"
    text += "\n\nNo   space"
    lines = commonmark.on_page_markdown(text).split("\n")
    assert lines[:4] == ["Two:", "", "- one", "- two"]
    assert lines[9:14] == ["    ```sh", "    a", "    ```", "", "    More."]
    assert lines[-1] == "No   space"


def test_cells_of_a_wide_table_know_their_column() -> None:
    head = "<table><tr><th>a</th><th>b &lt;</th><th>c</th><th>d</th></tr>"
    table = head + '<tr><td>1</td><td style="x">2</td><td>3</td><td>4</td></tr></table>'
    assert '<td data-column="b &lt;" style="x">2</td>' in wide_tables.on_page_content(table)
    narrow = "<table><tr><th>a</th></tr><tr><td>1</td></tr></table>"
    assert wide_tables.on_page_content(narrow) == narrow


def source_of(package: str) -> str:
    """Return a package's code with the parts of a text joined."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    files = sorted(Path(spec.origin).parent.rglob("*.py"))
    text = "\n".join(path.read_text("utf-8") for path in files)
    return re.sub(r'"\s*f?"', "", text)


SOURCE = source_of("fedlora_flwr") + source_of("flwr")


def test_the_messages_under_troubleshooting_are_real() -> None:
    page = (DOCS / "troubleshooting.md").read_text("utf-8")
    rows = re.findall(r"^\| (`.*?`) \| ", page, re.M)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    parts = {
        part.strip().removesuffix(" =")
        for message in messages
        for part in re.split(r"…|\[|\]", message)
        if len(part.strip()) > 5
    }
    assert len(messages) > 40
    # Those of OpenSSL, and those that `InvalidValue` puts together.
    assert {part for part in parts if part not in SOURCE} == {
        "certificate verify failed: unable to get local issuer certificate",
        "certificate has expired",
        "cannot be used: did you mean",
        "cannot be used: expected",
        "expected one of",
    }
