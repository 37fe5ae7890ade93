"""A run's report: what it tells, that it escapes everything, and that it loads nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from fedlora_flwr.config import RunConfig
from fedlora_flwr.report.facts import RunFacts
from fedlora_flwr.report.page import run_report, runs_report
from tests.report.support import facts, parsed, row, seeds, summary, texts

EVIL = (
    "<script>alert('x')</script>\"><img src=https://a.example/x onerror=alert(2)> & \x1b[31m\ud800"
)
PAGE = run_report(facts())


def section(page: str, anchor: str) -> str:
    (found,) = parsed(page).findall(f".//section[@id='{anchor}']")
    return " ".join(" ".join(found.itertext()).split())


def cells(page: str, caption: str) -> list[list[str]]:
    (table,) = (t for t in parsed(page).iter("table") if t[0].text == caption)
    return [[texts(cell) for cell in line] for line in table.iter("tr")]


def test_a_report_tells_what_the_files_of_the_run_hold() -> None:
    assert "accuracy 12.5% → 62.5%" in section(PAGE, "result")
    assert "largest ε spent 8 of 8" in section(PAGE, "result")
    assert "Choices: can be told from chance." in section(PAGE, "result")
    assert cells(PAGE, "Accuracy on the public records")[-1] == ["4", "62.5%"]
    assert cells(PAGE, "ε by client against its budget, the largest share first")[1:] == [
        ["device-0000", "100%", "8", "8", "0.001", "4", "6 s"],
        ["device-0001", "50%", "4", "8", "0.001", "4", "6 s"],
        ["device-0002", "33%", "2.667", "8", "0.001", "4", "6 s"],
    ]
    assert cells(PAGE, "Bytes of arrays, all clients together")[1] == [
        "1", "1.5 kB", "2 kB", "6 kB",
    ]  # fmt: skip
    assert cells(PAGE, "Records by client and class")[1] == ["0", "7", "7", "0"]
    assert ["federation.strategy", "as-lora"] in cells(PAGE, "Keys that differ from their default")
    assert ["privacy.delta", "0.001"] in cells(PAGE, "Keys at their default")
    assert "Verdict: too weak to say" in section(PAGE, "audit")


def test_the_choices_are_those_of_the_plans() -> None:
    found = cells(PAGE, "Rounds in which each block trained a factor")
    assert found[1:] == [
        ["layer.0", "2", "2", "0", "0"],
        ["layer.1", "0", "4", "0", "0"],
        ["layer.2", "2", "0", "2", "0"],
    ]
    (chart,) = (s for s in parsed(PAGE).iter("svg") if "3 blocks" in s.get("aria-label", ""))
    assert "layer.2, round 2: A and B" in [one.text for one in chart.iter("title")]
    alike = facts()
    plans = [{**one, "plan": "B"} for one in alike.rounds]
    assert 'id="choices"' not in run_report(replace(alike, rounds=plans))


def test_a_report_says_who_held_the_records_and_that_runs_add_up() -> None:
    run = facts()
    held = (
        "This was a simulation: one process held the records of all 3 simulated clients. The "
        "promise is to whoever sees the adapter, and not to that process."
    )
    told = section(run_report(run), "privacy")
    assert held in told
    assert "whoever sees the results of several has seen the sum of their ε" in told
    single = run_report(replace(run, summary={**run.summary, "num_clients": 1}))
    assert "the records of the only simulated client." in section(single, "privacy")
    on_devices = replace(run, summary={**run.summary, "simulated": False}, split={})
    assert "one process" not in section(run_report(on_devices), "privacy")
    for_life = replace(run, config=replace(run.config, ledger_scope="lifetime"))
    assert "seen the sum" not in section(run_report(for_life), "privacy")


def test_a_report_begins_with_three_sentences() -> None:
    run = facts(config=RunConfig(strategy="as-lora", num_rounds=4, epsilon=3.0))
    (short,) = parsed(
        run_report(replace(run, summary={**run.summary, "epsilon_max": 3.0}))
    ).findall(".//p[@id='in-short']")
    assert texts(short) == (
        "as-lora trained LoRA adapters over 4 rounds with 3 simulated clients. ε = 3 means that "
        "what one record adds makes no outcome more than 20.1 times as likely, except with "
        "probability δ. The accuracy was 12.5% at the start and 62.5% at the end."
    )
    free = replace(run, config=replace(run.config, epsilon=float("inf")))
    assert "so it promises nothing about any record" in run_report(free)


def test_a_public_report_leaves_out_clients_split_and_paths() -> None:
    secret = "a-hidden-name"
    config = RunConfig(
        dataset=f"/home/{secret}", class_names=f"{secret},b", state_dir=f"/home/{secret}",
        partition_column=secret, model=f"folder/{secret}", num_rounds=4,
    )  # fmt: skip
    run = facts(config=config)
    rows = [{**one, "failures": [secret], "suspects": [secret]} for one in run.rounds]
    clients = [{**one, "client": secret} for one in run.clients]
    split = {"partitioner": "iid", "clients": [{"by_class": {secret: 7}}]}
    summary = {**run.summary, "status": "failed", "error": secret}
    run = replace(
        run, name=secret, rounds=rows, clients=clients, split=split, summary=summary,
    )  # fmt: skip
    assert secret in run_report(run)
    page = run_report(run.for_others())
    assert secret not in page
    assert "Failed replies: 5." in section(page, "failures")
    assert "3 simulated clients" in section(page, "privacy")


def test_a_chart_of_zeros_alone_is_not_drawn() -> None:
    run = facts()
    title = "Error of averaging factors"
    assert title in run_report(run)
    zeros = [{**one, "mean_error": 0.0} for one in run.rounds]
    assert title not in run_report(replace(run, rounds=zeros))


@pytest.mark.parametrize("rounds", [100, 300])
def test_a_large_run_stays_below_a_megabyte(rounds: int) -> None:
    big = facts(rounds, 1000)
    blocks = [f"base_model.model.layer.{n}" for n in range(64)]
    plans = [{**one, "plan": ("AB" if n % 2 else "BA") * 32} for n, one in enumerate(big.rounds)]
    page = run_report(replace(big, rounds=plans, summary={**big.summary, "blocks": blocks}))
    parsed(page)
    assert len(page.encode()) < 1_000_000
    assert "500 of 1000 clients" in page


def hostile() -> RunFacts:
    """Return a run in which every text that a client, a server or a file may choose is hostile."""
    run = facts()
    rows: list[dict[str, Any]] = [dict(one) for one in run.rounds]
    rows[1].update(failures=[EVIL], declined=[EVIL], suspects=[EVIL])
    told = [{"round": 1, "client": EVIL, "epsilon": EVIL, "delta": None, "seconds": [EVIL]}]
    ended = {
        **run.summary, "status": "failed", "error": EVIL, "remarks": {EVIL: EVIL},
        "blocks": [EVIL, "layer.1", "layer.2"], "accountant": EVIL, "versions": {EVIL: EVIL},
    }  # fmt: skip
    split = {"partitioner": EVIL, "clients": [{"by_class": {EVIL: 3}}]}
    bound = {"epsilon": 1.0, "statistic": EVIL, "assumes": EVIL}
    audit = {**run.audit, "bounds": [bound], "verdict": EVIL, "attack": EVIL}
    config = RunConfig(dataset=EVIL.replace("\x1b", "").replace("\ud800", ""))
    return RunFacts(EVIL, config, ended, rows, told, split, audit)


@pytest.mark.parametrize("page", [run_report(hostile()), runs_report([hostile(), facts()])])
def test_texts_of_a_run_are_never_markup(page: str) -> None:
    page.encode()
    document = parsed(page)
    known = {"html", "head", "meta", "title", "style", "body", "a", "header", "h1", "p", "strong",
             "span", "nav", "ul", "li", "main", "section", "h2", "dl", "div", "dt", "dd", "figure",
             "figcaption", "svg", "line", "text", "polyline", "circle", "rect", "output",
             "details", "summary", "table", "caption", "thead", "tbody", "tr", "th", "td", "footer",
             "script", "polygon", "b"}  # fmt: skip
    assert {one.tag for one in document.iter()} <= known
    assert len([*document.iter("script")]) == 1
    assert not [name for one in document.iter() for name in one.attrib if name.startswith("on")]
    assert "<script>alert('x')</script>\"><img src=https" in texts(document)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)


def test_nothing_is_fetched_and_no_other_script_may_run() -> None:
    document = parsed(PAGE)
    linked = [one.get(key) for one in document.iter() for key in ("src", "href") if one.get(key)]
    assert linked
    assert all(str(link).startswith("#") for link in linked)
    assert "url(" not in PAGE
    assert "@import" not in PAGE
    (policy,) = (m.get("content") for m in document.iter("meta") if m.get("http-equiv"))
    assert str(policy).startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in str(policy)


@pytest.mark.parametrize("page", [PAGE, runs_report(seeds({1: 0.5, 2: 0.6}))])
def test_tables_and_charts_can_be_read_without_seeing_them(page: str) -> None:
    document = parsed(page)
    tables = [*document.iter("table")]
    assert tables
    for table in tables:
        assert table[0].tag == "caption"
        assert table[0].text
        assert {one.get("scope") for one in table.iter("th")} == {"col", "row"}
    charts = [s for s in document.iter("svg") if s.get("aria-hidden") != "true"]
    assert charts
    for chart in charts:
        assert (chart.get("role"), chart.get("tabindex")) == ("img", "0")
        assert len(str(chart.get("aria-label"))) > 20
        names = [one.text for one in chart.iter("text") if one.get("class") == "name"]
        assert len(names) == 2
        assert all(names)
    scrolled = [d for d in document.iter("div") if d.get("class") == "scroll"]
    assert all((d.get("tabindex"), d.get("role")) == ("0", "region") for d in scrolled)
    anchors = {one.get("id") for one in document.iter()}
    assert {str(a.get("href"))[1:] for a in document.iter("a")} <= anchors
    ids = [one.get("id") for one in document.iter() if one.get("id")]
    assert len(ids) == len(set(ids))


def test_every_point_has_its_value() -> None:
    (chart,) = (
        s for s in parsed(PAGE).iter("svg") if str(s.get("aria-label")).startswith("Loss on")
    )
    values = [texts(one) for one in chart.iter("circle")]
    assert values == [f"round {n}: loss {2 - n / 4:.4g}" for n in range(5)]


def test_a_run_that_was_killed_has_a_report() -> None:
    page = run_report(facts(summary={}, split={}, audit={}))
    assert "The run has the status not ended." in section(page, "failures")
    assert "accuracy 12.5% → 62.5%" in section(page, "result")
    assert 'id="audit"' not in page
    config = RunConfig()
    nothing = run_report(RunFacts("none", config, {}, []))
    assert "rounds 0 of 20" in section(nothing, "result")


def test_a_run_without_privacy_promises_nothing() -> None:
    config = RunConfig(epsilon=float("inf"), num_rounds=1)
    rows = [{"round": 0, "accuracy": 0.5, "seconds": 1.0}, {**row(1, 1), "epsilon_max": None}]
    ended = {**summary(rows, config, 1), "epsilon_max": 0.0, "epsilon_budget": None}
    page = run_report(RunFacts("open", config, ended, rows))
    assert "None. The run added no noise (epsilon = inf)" in section(page, "privacy")
    assert "ε spent" not in page


def test_folders_of_the_machine_are_not_told() -> None:
    config = RunConfig(dataset="/home/someone/secret/data.csv", state_dir="/home/someone/state")
    page = run_report(facts(config=config))
    assert "…/data.csv" in page
    assert "someone" not in page
