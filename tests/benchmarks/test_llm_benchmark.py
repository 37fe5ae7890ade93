"""The LLM benchmark on a tiny model: natural clients, Flower's six strategies and ours, one ε."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.tiny_llm import SOURCES, conversation, make, sentences
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.recipes import load_recipe, recipe_names
from fedlora_flwr.places import FLOWERS
from fedlora_flwr.strategies import strategy_class
from fedlora_flwr.studies.compare import run_comparison
from fedlora_flwr.studies.compare_methods import read_methods
from fedlora_flwr.studies.compare_results import read_rows
from fedlora_flwr.studies.comparison import Comparison
from fedlora_flwr.tasks.registry import build_task

ROOT = Path(__file__).parents[2]
OURS = ("dp-lora", "ffa-lora", "rolora", "la-lora")
ROWS = (*FLOWERS, *OURS)
# Rows need to differ, not to learn. With one step FedProx has no pull and LA-LoRA no A. With one
# round FedAvgM has no momentum.
SMALLER = (
    *("num-rounds=2", "local-steps=2", "rank=2", "max-length=64", "lr-a=0.1", "lr-b=0.1"),
    *("fedprox.proximal-mu=10", "device=cpu"),
    r"lora-targets=.*\.(q|v)_proj",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llm") / "tiny"
    make(made, steps=30)  # After fewer the model says one word, and all rows tie.
    return made


@pytest.fixture(scope="module")
def config(folder: Path) -> RunConfig:
    return load_recipe(str(folder / "recipe.toml"), [*SMALLER])


def test_the_tiny_recipe_is_the_recipe_with_other_files_and_sizes(folder: Path) -> None:
    tiny, whole = load_recipe(str(folder / "recipe.toml")), load_recipe("llm-benchmark")
    same = ("task", "partitioner", "partition_column", "optimizer", "lora_targets", "epsilon")
    assert all(getattr(tiny, name) == getattr(whole, name) for name in same)
    assert {key.partition(".")[0] for key, _ in whole.own} == FLOWERS.keys() - {"fedavg"}
    assert {key for key, _ in tiny.own} == {key for key, _ in whole.own}


def test_each_client_holds_one_source(folder: Path, config: RunConfig) -> None:
    lines = (folder / "data" / "train.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    source_of = {row["messages"][0]["content"]: row["source"] for row in rows}
    counts = Counter(row["source"] for row in rows)
    assert len(source_of) == len(rows), "a prompt tells its source"
    assert sorted(counts) == sorted(SOURCES)
    task, tokenizer = (
        build_task(config.task, config),
        AutoTokenizer.from_pretrained(folder / "model"),
    )
    for client, source in enumerate(sorted(SOURCES)):
        records = task.client_records(client, len(SOURCES))
        assert len(records) == counts[source]
        for ids in records.batch(torch.arange(len(records)))["input_ids"]:
            text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            # A long prompt may be cut within the bytes of one character.
            prompt = text.split("<|user|>")[1].split("<|end|>")[0].rstrip("\ufffd")
            assert {s for p, s in source_of.items() if p.startswith(prompt)} == {source}


def test_one_comparison_runs_all_at_the_same_epsilon(config: RunConfig, tmp_path: Path) -> None:
    methods = read_methods(ROWS, config)
    summary, _ = run_comparison(
        Comparison(config, methods, (8.0,), seeds=1, trials=0), tmp_path, lambda *_: None
    )
    rows = read_rows(tmp_path / "rows.csv")
    assert list(rows["error"]) == [""] * len(ROWS)
    assert list(rows["strategy"]) == [*ROWS]
    assert rows["epsilon_max"].between(0.99 * 8, 8).all()
    assert list(summary["row"]) == [*ROWS]
    final = dict(zip(rows["row"], rows["final"], strict=True))
    # FedAvg and DP-LoRA differ in the order of a sum. So few tokens leave room for other ties;
    # tests/strategies/test_flowers.py compares the arrays.
    assert final["fedavg"] == pytest.approx(final["dp-lora"], abs=0.002)
    assert len(set(final.values())) > 2
    table = (tmp_path / "table.md").read_text("utf-8")
    assert all(f"| {name}" in table for name in ROWS)


def test_sentences_are_prose_of_a_page() -> None:
    blocks = (
        "# A title of six or more words",
        "One sentence that goes\nover two lines. `This` is a second short one.",
        "| a | table of six words or more |",
        "```\nsome code that has six words or more\n```",
    )
    first, second = "One sentence that goes over two lines.", "`This` is a second short one."
    assert sentences("\n\n".join(blocks)) == [first, second]
    asked, answer = conversation("one two three four five six")
    assert (asked["content"], answer["content"]) == ("Continue: one two three", "four five six")


def test_the_page_names_what_there_is() -> None:
    page = (ROOT / "docs" / "llm_benchmark.md").read_text("utf-8")
    (commands,) = set(re.findall(r"--strategies ([\w,-]+)", page))
    assert commands.split(",") == [*ROWS]
    assert all(strategy_class(name) for name in ROWS)
    assert "llm-benchmark" in recipe_names()
