"""A run whose server lets the model answer public records: rows, summary, samples, report."""

from __future__ import annotations

import ast
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import fedlora_flwr
from fedlora_flwr import compare, evaluate
from fedlora_flwr.cli.run_screen import closing_rows
from fedlora_flwr.cli.watch_screen import screen
from fedlora_flwr.config import RunConfig, device_config
from fedlora_flwr.report.page import run_report
from fedlora_flwr.report.scales import WRITTEN
from fedlora_flwr.server.followed import Followed
from fedlora_flwr.server.report import facts_of, write_report
from fedlora_flwr.server.rounds import describe_round
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.server.samples import LONGEST, MOST, keep_samples
from fedlora_flwr.simulations.runner import prepare_run, run_in_process
from fedlora_flwr.tasks.answers import Answer
from tests.backbones import checkpoints
from tests.conftest import QUICK
from tests.tasks.conversations import LAYERS
from tests.tasks.tiny_tasks import WORDS


class Run(NamedTuple):
    folder: RunDirectory
    config: RunConfig
    summary: dict[str, Any]


def toy_rows(count: int, seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [
        {"prompt": " ".join(rng.choices(WORDS, k=rng.randint(3, 6))), "response": "yes it is"}
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def run(chat_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a private run that learns one answer to everything."""
    root = tmp_path_factory.mktemp("samples")
    checkpoints.write_split(root / "set", "train", toy_rows(240, 0))
    checkpoints.write_split(root / "set", "validation", toy_rows(30, 1))
    changes: dict[str, Any] = {
        "task": "instruction-tuning", "model": str(chat_models["llama"]), "strategy": "ffa-lora",
        "dataset": str(root / "set"), "num-rounds": 10, "local-steps": 4, "optimizer": "adamw",
        "lr-b": 0.1, "lora-targets": LAYERS["llama"], "eval-every": 5, "generation-limit": 12,
        "max-new-tokens": 6, "eval-batch-size": 8, "report-unprotected-metrics": True,
        "min-records": 32, "state-dir": str(root),
    }  # fmt: skip
    config = RunConfig.of(QUICK, changes)
    run_dir = RunDirectory(root / "run")
    summary = run_in_process(prepare_run(config), run_dir, lambda row: None)
    return Run(run_dir, config, summary)


def test_a_comparison_tunes_and_reports_by_the_figure_that_is_named(
    run: Run, tmp_path: Path
) -> None:
    found = compare(
        replace(run.config, num_rounds=5), ["ffa-lora"], epsilons=[8], seeds=1, trials=2,
        baselines="none", output=tmp_path / "all", progress=False, metric_for_best_model="rouge_l",
    )  # fmt: skip
    row = found.runs.query("phase == 'report'").iloc[0]
    rates = {name.replace("-", "_"): float(row[name]) for name in ("lr-a", "lr-b", "lr-head")}
    own: dict[str, Any] = {"epsilon": 8.0, "seed": 1, "state_dir": str(tmp_path), **rates}
    config = replace(run.config, num_rounds=5, **own)
    alone = run_in_process(prepare_run(config), RunDirectory(tmp_path / "one"), lambda row: None)
    assert found.metric == "rouge_l"
    assert (row["initial"], row["final"]) == (alone["initial_rouge_l"], alone["final_rouge_l"])
    assert row["final"] != alone["final_token_accuracy"]
    tried = found.runs.query("phase == 'tune'")
    assert rates["lr_b"] == tried.sort_values("final")["lr-b"].iloc[-1]


def test_figures_of_answers_are_in_rows_summary_and_screens(run: Run) -> None:
    rows = run.folder.rounds()
    measured = [row for row in rows if "rouge_l" in row]
    assert [row["round"] for row in measured] == [0, 5, 10]
    for name in WRITTEN:
        told = [dict(row)[name] for row in measured]
        assert run.summary[f"initial_{name}"] == told[0]
        assert run.summary[f"final_{name}"] == told[-1]
        assert run.summary["best"]["metrics"][name] in told
    assert measured[0]["rouge_l"] < 0.2
    assert measured[-1]["rouge_l"] > 0.6
    last = f"ROUGE-L {measured[-1]['rouge_l']:.1%}  exact match {measured[-1]['exact_match']:.1%}"
    assert last in describe_round(rows[-1], "token_accuracy")
    followed = Followed(run.folder)
    followed.new_rounds()
    assert last in "\n".join(screen(followed, run.config, "token_accuracy", 100))
    shown = dict(closing_rows(run.summary))
    assert shown["ROUGE-L"].endswith(f"→ {measured[-1]['rouge_l']:.1%}")


def test_an_adapter_measures_as_its_run_did(run: Run) -> None:
    found = evaluate(run.folder.path, device="cpu").metrics
    last = dict(run.folder.rounds()[-1])
    assert found == pytest.approx({name: last[name] for name in found}, rel=1e-4)
    assert {*WRITTEN, "perplexity"} <= found.keys()


def test_samples_are_of_fixed_public_prompts_before_and_after(run: Run) -> None:
    kept = json.loads((run.folder.path / "samples.json").read_text())
    assert (kept["answered"], kept["first"]["round"], kept["last"]["round"]) == (12, 0, 10)
    assert len(kept["asked"]) == len(kept["first"]["said"]) == len(kept["last"]["said"]) == MOST
    public = {f"user: {row['prompt']}" for row in toy_rows(30, 1)}
    assert {one["prompt"] for one in kept["asked"]} <= public
    assert all(one["right"] == ["yes it is"] for one in kept["asked"])
    assert "yes it is" not in kept["first"]["said"]
    assert kept["last"]["said"].count("yes it is") >= 2
    page = (run.folder.path / "report.html").read_text("utf-8")
    for one in kept["asked"]:
        assert one["prompt"] in page
    assert "ROUGE-L on the public records" in page
    assert "Perplexity on the public records" in page
    assert "may repeat private records" not in page
    # Others get no texts.
    others = run_report(facts_of(run.folder).for_others())
    assert "yes it is" not in others


def test_clients_write_no_answers(run: Run) -> None:
    """An answer on a private record would tell of it: the attacker is the server's settings."""
    rows = run.folder.rows("clients")
    # They do tell the task's own figures here, because the run asks for unprotected ones.
    assert all(any("token_accuracy" in name for name in row) for row in rows)
    assert not [name for row in rows for name in row if any(word in name for word in WRITTEN)]
    device = {"client-id": "one", "epsilon": 1.0, "delta": 1e-5, "task": "digits"}
    there = device_config({"generation-limit": 9, "max-new-tokens": 999}, device)
    assert (there.generation_limit, there.max_new_tokens) == (0, 128)


def test_only_a_server_and_a_user_with_an_adapter_ask_for_answers() -> None:
    package = Path(fedlora_flwr.__file__).parent
    asking = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "fedlora_flwr.tasks.answers"
        and "measured" in {name.name for name in node.names}
    }  # fmt: skip
    assert asking == {"server/samples.py", "trained/evaluate.py", "studies/metric.py"}
    # A task's method takes a model. Whether a server answers takes nothing.
    calls = re.compile(r'"answers"\)|\.answers\((?!\))')
    calling = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if calls.search(path.read_text("utf-8"))
    }
    assert calling == {"tasks/answers.py", "tasks/registry.py"}


def answers(*said: str) -> list[Answer]:
    return [Answer(f"prompt {n}", ("right",), text) for n, text in enumerate(said)]


def test_a_resumed_run_keeps_its_first_answers(tmp_path: Path) -> None:
    run_dir = RunDirectory(tmp_path)
    path = tmp_path / "samples.json"
    for server_round, text in ((0, "before"), (3, "between"), (5, "after")):
        keep_samples(run_dir, server_round, answers(text, text))
    kept = json.loads(path.read_text())
    assert kept["first"] == {"round": 0, "said": ["before"] * 2}
    assert kept["last"] == {"round": 5, "said": ["after"] * 2}
    keep_samples(run_dir, 0, answers("again"))  # It began again, before its first checkpoint.
    assert json.loads(path.read_text())["first"]["said"] == ["again"]
    path.unlink()
    keep_samples(run_dir, 7, answers("late"))
    assert json.loads(path.read_text())["first"] == {"round": 7, "said": ["late"]}


def test_few_prompts_and_short_texts_are_kept(tmp_path: Path) -> None:
    keep_samples(RunDirectory(tmp_path), 0, answers(*["x" * 9_999] * 40))
    kept = json.loads((tmp_path / "samples.json").read_text())
    assert kept["answered"] == 40
    assert [len(text) for text in kept["last"]["said"]] == [LONGEST + 1] * MOST


def test_markup_in_an_answer_is_shown_as_text(run: Run, tmp_path: Path) -> None:
    """The attacker is who trained the model, or who wrote its prompts."""
    evil = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\x00"
    run_dir = RunDirectory(tmp_path / "run")
    run_dir.write_config(replace(run.config, run_dir="", epsilon=float("inf")))
    run_dir.append("rounds", {"round": 0, "loss": 1.0, "token_accuracy": 0.5, "seconds": 1.0})
    keep_samples(run_dir, 0, [Answer(evil, (evil,), evil)])
    page = write_report(run_dir).read_text("utf-8")
    assert "<script>alert" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4
    assert "may repeat private records" in page
