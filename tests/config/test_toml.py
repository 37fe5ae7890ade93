from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora_flwr.config import RunConfig, read_toml
from fedlora_flwr.config.names import by_section
from fedlora_flwr.errors import InvalidValue

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "fedlora_flwr" / "config" / "recipes" / "digits.toml"
DEFAULTS = RunConfig().items()


@given(
    st.fixed_dictionaries(
        {
            "model": st.text(),
            "lora-targets": st.text(),
            "run-dir": st.text().map(lambda tail: "/" + tail),
            "epsilon": st.one_of(st.floats(1e-12, 1e12), st.just(math.inf)),
            "lora-alpha": st.floats(1e-3, 1e5),
            "delta": st.floats(1e-300, 1),
            "seed": st.integers(0, 2**62),
            "rslora": st.booleans(),
        }
    )
)
def test_written_toml_is_read_back(values: dict[str, Any]) -> None:
    config = RunConfig.of(values)
    assert RunConfig.of(tomllib.loads(config.to_toml())) == config


def test_a_written_file_is_a_recipe(tmp_path: Path) -> None:
    config = RunConfig.of({"epsilon": math.inf, "lora-targets": r"blocks\.\d+\.attn", "seed": 7})
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert RunConfig.of(read_toml(path)) == config


@pytest.mark.parametrize("content", [None, "rank = ", "= 3"])
def test_an_unreadable_recipe_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "mine.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidValue, match=r"mine\.toml"):
        read_toml(path)


def test_a_recipe_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b'task = "\xff\xfe"')
    with pytest.raises(InvalidValue, match=r"mine\.toml"):
        read_toml(path)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_recipe_may_begin_with_a_byte_order_mark(mark: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'{mark}strategy = "la-lora"\n', encoding="utf-8")
    assert read_toml(path) == {"strategy": "la-lora"}


def test_the_app_runs_the_digits_recipe() -> None:
    """``flwr run -c`` overrides only keys that ``[tool.flwr.app.config]`` holds."""
    with (ROOT / "pyproject.toml").open("rb") as stream:
        app_config = tomllib.load(stream)["tool"]["flwr"]["app"]["config"]
    assert {section: list(keys) for section, keys in app_config.items()} == by_section(DEFAULTS)
    # A deployment takes these defaults: its noise must not follow a seed that is public.
    assert RunConfig.of(app_config, {"reproducible": True}) == RunConfig.of(read_toml(DIGITS))
    assert RunConfig.of(app_config).items() == DEFAULTS
