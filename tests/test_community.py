"""Files that a repository's host and its visitors read: workflows, forms, citation, policies."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
HOST = ROOT / ".github"
WORKFLOWS = sorted((HOST / "workflows").glob("*.yml"))
FORMS = sorted({*(HOST / "ISSUE_TEMPLATE").glob("*.yml")} - {HOST / "ISSUE_TEMPLATE/config.yml"})
PAGES = [ROOT / f"{name}.md" for name in ("CONTRIBUTING", "SECURITY", "CODE_OF_CONDUCT")]
PAGES += [ROOT / "CHANGELOG.md", ROOT / "docs" / "versions.md"]
ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")
# By major version. The action that publishes to PyPI names its own as a branch.
PINNED = re.compile(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)|\./\.github/workflows/\w+\.yml")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def name_of(path: Path) -> str:
    return path.name


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


def python_versions() -> list[str]:
    last = (line.split(" :: ")[-1] for line in PROJECT["classifiers"] if "Python :: 3." in line)
    return sorted(last)


def test_the_checks_run_on_the_versions_of_python_that_the_package_names() -> None:
    jobs = read(HOST / "workflows/ci.yml")["jobs"]
    named = python_versions()
    assert jobs["test"]["strategy"]["matrix"]["python"] == named == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == f">={named[0]}"
    single = {
        step["with"]["python-version"] for path in WORKFLOWS for step in steps(read(path))
        if "setup-python" in step.get("uses", "")
    }  # fmt: skip
    assert single == {"${{ matrix.python }}", named[0]}


def test_every_make_command_of_a_workflow_and_of_the_pages_is_a_target() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    runs = [step.get("run", "") for path in WORKFLOWS for step in steps(read(path))]
    called = set(re.findall(r"^make ([\w-]+)", "\n".join(runs), re.M))
    assert called == {"setup", "docs", "test", "test-slow", "test-deploy"}
    for page in [*PAGES, HOST / "PULL_REQUEST_TEMPLATE.md"]:
        called |= set(re.findall(r"(?:`|^    )make ([\w-]+)", page.read_text("utf-8"), re.M))
    assert called <= targets


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_a_workflow_may_do_what_it_needs_and_no_more(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"].endswith("-${{ github.ref }}")
    assert "secrets." not in path.read_text("utf-8")
    more = {
        name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job
    }
    assert more == ({"publish": {"id-token": "write"}} if path.stem == "release" else {})
    jobs = workflow["jobs"].values()
    used = [step["uses"] for step in [*steps(workflow), *jobs] if "uses" in step]
    assert used
    assert [name for name in used if not PINNED.fullmatch(name)] == []
    assert all("uses" in job or job["timeout-minutes"] for job in jobs)
    kept = [step for step in steps(workflow) if step.get("uses", "").startswith("actions/checkout")]
    assert all(step["with"] == {"persist-credentials": False} for step in kept)


def test_a_release_publishes_the_files_that_the_checks_have_tried() -> None:
    checks, release = (read(HOST / f"workflows/{name}.yml") for name in ("ci", "release"))
    # YAML 1.1 reads the word `on` as true.
    assert "workflow_call" in checks[True]
    assert release[True] == {"push": {"tags": ["v*"]}}
    assert checks["concurrency"]["group"] != release["concurrency"]["group"]
    jobs = release["jobs"]
    assert ROOT / jobs["checks"]["uses"] == HOST / "workflows/ci.yml"
    assert (jobs["publish"]["needs"], jobs["checks"]["needs"]) == ("checks", "version")
    (kept,) = [s["with"] for s in steps(checks) if "upload-artifact" in s.get("uses", "")]
    (taken,) = [s["with"] for s in steps(release) if "download-artifact" in s.get("uses", "")]
    assert (kept["name"], kept["path"]) == (taken["name"], taken["path"]) == ("dist", "dist/")
    assert f"## {PROJECT['version']} (" in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("tag", "heading", "good"),
    [
        ("v{}", "## {} (2026-12-01)", True),
        ("v{}", "## {} (unreleased)", False),
        ("v{}", "## {}.1 (2026-12-01)", False),
        ("v{}.1", "## {} (2026-12-01)", False),
        ("{}", "## {} (2026-12-01)", False),
    ],
)
def test_a_tag_that_is_not_the_released_version_stops_the_release(
    tag: str, heading: str, good: bool, tmp_path: Path
) -> None:
    version = PROJECT["version"]
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "CHANGELOG.md").write_text(f"# Changes\n\n{heading.format(version)}\n", "utf-8")
    job = read(HOST / "workflows/release.yml")["jobs"]["version"]
    (script,) = [step["run"] for step in job["steps"] if "run" in step]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    env = {**os.environ, "PATH": path, "GITHUB_REF_NAME": tag.format(version)}
    # As the host runs a step that names no shell.
    done = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=env, check=False)
    assert (done.returncode == 0) == good


@pytest.mark.parametrize("shell", [["bash"], []], ids=["by bash", "by itself"])
def test_the_script_of_all_tests_starts_by_either_way(tmp_path: Path, shell: list[str]) -> None:
    interpreter = tmp_path / "python3"
    interpreter.write_text('#!/bin/sh\necho "started $1"\n')
    interpreter.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    said = subprocess.run(
        [*shell, str(ROOT / ".ci/run")], env={"PATH": path}, capture_output=True, text=True
    )
    started = Path(said.stdout.removeprefix("started ").strip())
    assert (said.stderr, said.returncode) == ("", 0)
    compile(started.read_text("utf-8"), str(started), "exec")


FAILS_AT_FIRST = """
from pathlib import Path
import pytest
pytestmark = pytest.mark.slow
def test_a_deadline():
    seen = Path("seen")
    try:
        assert seen.exists()
    finally:
        seen.touch()
"""
FAILS_ALWAYS = "def test_that_finds_something(): assert False"
# As in the repository's own Makefile, `test` leaves out slow tests unless it is asked for them.
TARGETS = """
PYTEST :=
setup docs:
test:
\t@{python} -m pytest -q tests -m 'not slow' -o cache_dir=.pytest_cache $(PYTEST); failed=$$?; \\
\t{types} || failed=1; exit $$failed
test-deploy:
"""


@pytest.mark.parametrize(
    ("tests", "types", "passes"),
    [
        (FAILS_AT_FIRST, "true", True),
        (FAILS_AT_FIRST + FAILS_ALWAYS, "true", False),
        (FAILS_AT_FIRST, "false", False),
    ],
    ids=["fails at first", "one fails always", "types fail, too"],
)
def test_only_a_test_that_fails_again_alone_fails_the_script_of_all_tests(
    tmp_path: Path, tests: str, types: str, passes: bool
) -> None:
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(tests)
    made = TARGETS.format(python=sys.executable, types=types)
    (tmp_path / "Makefile").write_text(made)
    script = [sys.executable, str(tmp_path / ".ci" / "all_tests.py")]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == passes, done.stdout + done.stderr
    assert "now run again alone: tests/test_it.py::test_a_deadline" in done.stdout


def test_updates_are_asked_for_what_the_repository_has() -> None:
    updates = read(HOST / "dependabot.yml")
    assert updates["version"] == 2
    assert {each["package-ecosystem"] for each in updates["updates"]} == {"github-actions", "pip"}


@pytest.mark.parametrize("path", FORMS, ids=name_of)
def test_a_form_is_complete(path: Path) -> None:
    form = read(path)
    assert {"name", "description", "title", "labels", "body"} == form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 1
    assert {field["type"] for field in fields} <= {"input", "textarea", "checkboxes"}
    assert all(field["attributes"]["label"] for field in fields)


def test_a_bug_names_version_command_configuration_and_log() -> None:
    assert [path.stem for path in FORMS] == ["bug", "feature", "privacy"]
    ids = {field.get("id") for field in read(HOST / "ISSUE_TEMPLATE/bug.yml")["body"]}
    assert {"version", "command", "config", "log"} <= ids
    # The host serves SECURITY.md there.
    assert (ROOT / "SECURITY.md").exists()
    for name in ("bug", "privacy"):
        assert (
            "(../security/policy)"
            in read(HOST / f"ISSUE_TEMPLATE/{name}.yml")["body"][0]["attributes"]["value"]
        )


def test_the_citation_is_of_this_version_and_names_every_paper_behind_a_method() -> None:
    cited = read(ROOT / "CITATION.cff")
    assert cited["cff-version"] == "1.2.0"
    assert (cited["title"], cited["version"]) == (PROJECT["name"], PROJECT["version"])
    assert cited["license"] == PROJECT["license"]
    assert set(cited["keywords"]) <= set(PROJECT["keywords"])
    ids = []
    for paper in cited["references"]:
        assert paper.keys() >= {"type", "title", "authors", "year", "doi", "url"}
        assert all(author["family-names"] and author["given-names"] for author in paper["authors"])
        ids += ARXIV.findall(paper["url"])
        assert paper["doi"] == f"10.48550/arXiv.{ids[-1]}"
        assert paper["year"] == 2000 + int(ids[-1][:2])
    assert len(ids) == len(set(ids)) == len(cited["references"])
    methods = set(ARXIV.findall((ROOT / "docs/methods.md").read_text("utf-8")))
    assert len(methods) > 10
    assert methods <= set(ids)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if link.startswith("https://"):
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as the repository's host makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
