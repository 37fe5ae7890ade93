"""A report in a real browser. Skipped where Playwright or a Chromium is not installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlora_flwr.report.page import run_report, runs_report
from tests.report.support import facts, seeds

sync_api = pytest.importorskip("playwright.sync_api")
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")
PHONE = {"width": 360, "height": 740}
DESK = {"width": 1200, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=BROWSER)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(run_report(facts(rounds=40)), encoding="utf-8")
    return path


def opened(browser: Any, file: Path, **options: Any) -> tuple[Any, list[str]]:
    """Open a file; return the page, and what its console and the network tell."""
    told: list[str] = []
    page = browser.new_page(**options)
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: told.append(request.url))
    page.goto(file.as_uri())
    return page, told


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen_without_an_error(
    browser: Any, file: Path, size: dict[str, int], scheme: str
) -> None:
    page, told = opened(browser, file, viewport=size, color_scheme=scheme)
    assert told == [file.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 23, 29)"}[scheme]


def test_the_pointer_and_the_arrow_keys_show_values(browser: Any, file: Path) -> None:
    page, _ = opened(browser, file, viewport=DESK)
    chart = page.locator("svg.plot").first
    chart.hover(position={"x": 200, "y": 60})
    (shown,) = page.locator(".tip:visible").all_inner_texts()
    assert shown.startswith("round ")
    assert ": accuracy " in shown
    cells = page.locator("svg.cells").first
    cells.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "layer.0, round 2: B" in page.locator(".tip:visible").all_inner_texts()
    page.keyboard.press("Escape")
    assert page.locator("svg.cells ~ .tip:visible").count() == 0


def test_a_keyboard_reaches_every_link_and_chart(browser: Any, file: Path) -> None:
    page, _ = opened(browser, file, viewport=DESK)
    wanted = page.locator("a, summary, [tabindex='0']").count()
    seen = set()
    for _ in range(wanted + 5):
        page.keyboard.press("Tab")
        seen.add(
            page.evaluate("""(() => {
            const all = [...document.querySelectorAll("a, summary, [tabindex='0']")];
            return all.indexOf(document.activeElement);
        })()""")
        )
    hidden = page.locator("details:not([open]) [tabindex='0']").count()
    assert len(seen - {-1}) == wanted - hidden


def test_markup_of_a_run_does_nothing(browser: Any, tmp_path: Path) -> None:
    evil = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
    run = facts()
    rows = [{**one, "suspects": [evil], "failures": [evil]} for one in run.rounds]
    told = [{**one, "client": evil} for one in run.clients]
    ended = {**run.summary, "blocks": [evil] * 3, "status": evil, "error": evil}
    hostile = replace(run, name=evil, rounds=rows, clients=told, summary=ended)
    for content in (run_report(hostile), runs_report([hostile, *seeds({1: 0.5, 2: 0.6})])):
        file = tmp_path / "evil.html"
        file.write_text(content, encoding="utf-8")
        page, told_by_browser = opened(browser, file)
        assert told_by_browser == [file.as_uri()]
        assert page.title() != "taken"
        assert page.locator("img").count() == 0


def test_a_script_that_got_in_would_not_run(browser: Any, file: Path, tmp_path: Path) -> None:
    worse = tmp_path / "worse.html"
    text = file.read_text("utf-8")
    worse.write_text(text.replace("</main>", "<script>document.title='taken'</script></main>"))
    page, told = opened(browser, worse)
    assert page.title() != "taken"
    assert any("Content Security Policy" in line for line in told)


def test_paper_shows_all_parts(browser: Any, file: Path) -> None:
    page, _ = opened(browser, file, viewport=DESK)
    assert len(page.pdf(format="A4")) > 20_000
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.get_by_text("privacy.delta").is_visible()
