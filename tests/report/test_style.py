"""Every color of a report can be read on its ground, in light and dark (WCAG 2.2, AA)."""

from __future__ import annotations

import re

import pytest

from fedlora_flwr.report.style import STYLE

LIGHT, DARK = (
    dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    for block in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[:2]
)
TEXT, DRAWN = 4.5, 3.0
"""Least contrast of a text, and of what is drawn (success criteria 1.4.3 and 1.4.11)."""
LOOKS = [f"look{n}" for n in range(6)]
MODES = ["mode-a", "mode-b", "mode-ab", "mode-none"]


def luminance(color: str) -> float:
    parts = [int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first: str, second: str) -> float:
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
def test_colors_have_the_contrast_that_the_standard_asks_for(colors: dict[str, str]) -> None:
    assert set(LIGHT) == set(DARK)
    grounds = ("ground", "raised")
    wanted = [(c, g, TEXT) for c in ("text", "quiet", "link", "bad", "good") for g in grounds]
    wanted += [(c, g, DRAWN) for c in (*LOOKS, *MODES, "focus", "bad") for g in grounds]
    wanted += [("in-cell", mode, TEXT) for mode in MODES] + [("ground", "text", TEXT)]
    found = {(a, b): contrast(colors[a], colors[b]) for a, b, _ in wanted}
    assert {(a, b): found[a, b] for a, b, least in wanted if found[a, b] < least} == {}


def test_every_color_that_is_used_is_one_of_these() -> None:
    assert set(re.findall(r"var\(--([\w-]+)\)", STYLE)) == set(LIGHT)
    rules = re.sub(r":root \{.*?\}", "", STYLE, flags=re.DOTALL)
    assert re.findall(r"#[0-9a-fA-F]{3,8}\b", rules) == []
