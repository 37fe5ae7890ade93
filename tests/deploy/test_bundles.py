from __future__ import annotations

import pickle
import tomllib
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from flwr.cli.build import build_fab_from_disk
from hypothesis import given
from hypothesis import strategies as st

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.sections import SECTIONS
from fedlora_flwr.deploy.bundles import MAX_PROJECT, BundleRefused, check_bundle
from fedlora_flwr.simulations.app import COMPONENTS, write_app
from tests.deploy.support import packed

Project = dict[str, Any]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "app"
    write_app(folder)
    return folder


@pytest.fixture
def project(app: Path) -> Project:
    return tomllib.loads((app / "pyproject.toml").read_text())


def test_what_flower_makes_of_the_fleets_app_is_served(app: Path) -> None:
    bundle = build_fab_from_disk(app)
    with zipfile.ZipFile(BytesIO(bundle)) as archive:
        assert archive.namelist() == ["pyproject.toml", ".info/CONTENT"]
        project = tomllib.loads(archive.read("pyproject.toml").decode())
    # `--run-config` overrides only what is there.
    assert RunConfig.of(project["tool"]["flwr"]["app"]["config"]) == RunConfig()
    assert set(project["tool"]["flwr"]["app"]["config"]) == set(SECTIONS)
    check_bundle(bundle)


def test_the_repository_is_no_bundle_for_a_device() -> None:
    with pytest.raises(BundleRefused, match=r"ship the folder operator/app"):
        check_bundle(build_fab_from_disk(Path(__file__).parents[2]))


@pytest.mark.parametrize(
    "name",
    [
        "fedlora_flwr/__init__.py", "client.py", "sitecustomize.py", "conftest.py", "evil.pth",
        "README.md", "/etc/passwd", "../pyproject.toml", "fedlora_flwr/", "./pyproject.toml",
        "PYPROJECT.TOML", ".info/CONTENT/x.py", "a\nb.py",
    ],
)  # fmt: skip
def test_any_other_file_is_refused_by_its_name(app: Path, name: str) -> None:
    project = ("pyproject.toml", (app / "pyproject.toml").read_bytes())
    for files in ((project, (name, "")), ((name, ""), project)):
        with pytest.raises(BundleRefused, match="files besides its") as caught:
            check_bundle(packed(*files))
        assert ascii(name) in str(caught.value)
        assert "\n" not in str(caught.value)


def twice(text: bytes) -> bytes:
    with pytest.warns(UserWarning, match="Duplicate name"):
        return packed(("pyproject.toml", text), ("pyproject.toml", text))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda text: b"", "cannot be read"),
        (lambda text: b"PK", "cannot be read"),
        (lambda text: packed((".info/CONTENT", "")), "exactly one pyproject.toml"),
        (twice, "exactly one pyproject.toml"),
        (lambda text: packed(("pyproject.toml", b"\xff")), "cannot be read"),
        (lambda text: packed(("pyproject.toml", "a = " + "[" * 50_000)), "cannot be read"),
        (lambda text: packed(("pyproject.toml", text), method=zipfile.ZIP_LZMA), "packs its"),
        (lambda text: packed(("pyproject.toml", text + b"#" * 2**18)), "more than 262,144 bytes"),
        (lambda text: packed((".info/CONTENT", "a")) * 10_000, "1,048,576 are allowed"),
    ],
)
def test_what_is_no_bundle_is_refused(
    app: Path, make: Callable[[bytes], bytes], reason: str
) -> None:
    with pytest.raises(BundleRefused, match=reason):
        check_bundle(make((app / "pyproject.toml").read_bytes()))


def test_a_bomb_takes_no_memory() -> None:
    bomb = packed(("pyproject.toml", b"#" * 2**28))
    tracemalloc.start()
    with pytest.raises(BundleRefused, match="more than"):
        check_bundle(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * MAX_PROJECT


def put(*keys: str, value: object) -> Callable[[Project], None]:
    def change(project: Project) -> None:
        table = project
        for key in keys[:-1]:
            table = table.setdefault(key, {})
        table[keys[-1]] = value

    return change


APP = ("tool", "flwr", "app")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put(*APP, "components", "clientapp", value="client:app"), "names the components"),
        (put(*APP, "components", "agentapp", value="client:app"), "names the components"),
        (put(*APP, "components", value={"clientapp": COMPONENTS["clientapp"]}), "components"),
        (put(*APP, "components", value="none"), "names the components 'none'"),
        (put(*APP, "fab-include", value=["**/*.py"]), "'tool.flwr.app.fab-include'"),
        (put(*APP, value="none"), "that is not a table"),
        (put("tool", "flwr", "federations", "a", value=1), "'tool.flwr.federations'"),
        (put("tool", "hatch", "build", value=1), "'tool.hatch'"),
        (put("build-system", "build-backend", value="evil"), "'build-system'"),
        (put("project", "scripts", "fedlora", value="evil:main"), "'project.scripts'"),
        (put("project", "entry-points", "a", "b", value="evil:main"), "'project.entry-points'"),
        (put("project", "dependencies", value=["fedlora-flwr", "evil"]), "the dependencies"),
        (put("project", "dependencies", value=["fedlora-flwr @ file:///evil"]), "dependencies"),
        (put("project", "dependencies", value="fedlora-flwr"), "the dependencies"),
        (put("project", "name", value=["a"]), "project.name that is not a text"),
    ],
)
def test_a_project_that_asks_for_more_is_refused(
    project: Project, change: Callable[[Project], None], reason: str
) -> None:
    check_bundle(packed(("pyproject.toml", tomli_w.dumps(project))))
    change(project)
    with pytest.raises(BundleRefused, match=reason) as caught:
        check_bundle(packed(("pyproject.toml", tomli_w.dumps(project))))
    assert "ship the folder operator/app" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_run_may_be_configured(project: Project) -> None:
    put(*APP, "config", "num-rounds", value=7)(project)
    put("project", "dependencies", value=[])(project)
    check_bundle(packed(("pyproject.toml", tomli_w.dumps(project))))


@given(data=st.data())
def test_a_damaged_bundle_raises_nothing_else(app: Path, data: st.DataObject) -> None:
    bundle = bytearray(build_fab_from_disk(app))
    for place in data.draw(st.lists(st.integers(0, len(bundle) - 1), min_size=1, max_size=9)):
        bundle[place] = data.draw(st.integers(0, 255))
    with suppress(BundleRefused):
        check_bundle(bytes(bundle[: data.draw(st.integers(1, len(bundle)))]))
