"""`evaluate` and `predict` on chat models: the adapter's folder, and the merged model's."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from fedlora_flwr import evaluate, merge, predict
from fedlora_flwr.cli import app
from fedlora_flwr.errors import InvalidValue
from tests.backbones import checkpoints
from tests.tasks import conversations, questions
from tests.tasks.texts import make_checkpoint, text_config, write_reviews
from tests.tasks.tiny_tasks import WORDS
from tests.trained.folders import exported


class Chats(NamedTuple):
    base: Path
    adapter: Path
    merged: Path
    data: Path


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [
        {
            "prompt": " ".join(rng.choices(WORDS, k=rng.randint(1, 4))),
            "response": " ".join(rng.choices(WORDS, k=rng.randint(1, 3))),
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Chats:
    """Return a chat model's adapter, the model that it is merged into, and records of a file."""
    root = tmp_path_factory.mktemp("chats")
    base = checkpoints.llama(root / "base", conversations.TEXTS)
    for name in ("train", "validation"):
        checkpoints.write_split(root / "own", name, rows(6))
    config = text_config(
        base, root / "own", task="instruction-tuning", max_length=48, max_new_tokens=7,
        lora_targets=conversations.LAYERS["llama"],
    )  # fmt: skip
    exported(config, root / "adapter")
    # Another run's settings are beside the merged model.
    (root / "config.toml").write_text('[task]\ntask = "digits"\n')
    (root / "run").mkdir()
    (root / "adapter").rename(root / "run" / "adapter")
    merge(root / "run" / "adapter", root / "merged", model=base)
    file = root / "new.jsonl"
    new = rows(9, seed=1)
    said = predict(root / "merged", pd.DataFrame(new), device="cpu")["answer"].tolist()
    for row, text in zip(new[:3], said, strict=False):  # Some are right, one is so in part.
        row["response"] = text
    new[3]["response"] = f"{said[3]} bali"
    pd.DataFrame(new).to_json(file, orient="records", lines=True)
    return Chats(base, root / "run" / "adapter", root / "merged", file)


def by_hand(folder: Path, data: Path) -> dict[str, float]:
    """Measure a plain model of transformers, one token after another."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scorer, losses, rouge, hits = RougeScorer(["rougeL"]), [], [], []
    for row in map(json.loads, data.read_text().splitlines()):
        prompt = f"<s><|user|>{row['prompt']}<|end|>\n<|assistant|>"
        given = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = tokenizer(f"{row['response']}<|end|>\n", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            scores = model(torch.tensor([given + answer])).logits[0].log_softmax(-1)
            losses += [-float(scores[len(given) + n - 1, token]) for n, token in enumerate(answer)]
            said: list[int] = []
            for _ in range(7):
                token = int(model(torch.tensor([given + said])).logits[0, -1].argmax())
                if token in (1, 2, 5):  # The ends of the tokenizer, the checkpoint, the template.
                    break
                said.append(token)
        text = tokenizer.decode(said, skip_special_tokens=True)
        rouge.append(scorer.score(row["response"], text)["rougeL"].fmeasure)
        hits.append(row["response"].strip() == text.strip())
    mean = sum(losses) / len(losses)
    figures = {"rouge_l": sum(rouge) / len(rouge), "exact_match": sum(hits) / len(hits)}
    return {"loss": mean, "perplexity": math.exp(mean), **figures}


def test_figures_of_adapter_and_merged_model_are_those_of_a_loop(chats: Chats) -> None:
    told: dict[str, Any] = {"generation_limit": 100, "eval_batch_size": 4, "device": "cpu"}

    adapter = evaluate(chats.adapter, chats.data, model=chats.base, **told)
    merged = evaluate(chats.merged, chats.data, **told)

    wanted = by_hand(chats.merged, chats.data)
    assert merged.records == adapter.records == 9
    assert merged.metrics.keys() == {*wanted, "token_accuracy"}
    for found in (adapter.metrics, merged.metrics):
        assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-3)
    assert 0.3 <= wanted["exact_match"] < wanted["rouge_l"] < 0.5
    # Without the key nothing is written.
    plain = evaluate(chats.merged, chats.data, device="cpu").metrics
    assert plain.keys() == {"loss", "token_accuracy", "perplexity"}


def test_the_command_shows_them(chats: Chats) -> None:
    options = ["--data", chats.data, "-c", "generation-limit=3", "-c", "device=cpu"]
    arguments = [*map(str, ("evaluate", chats.merged, *options))]

    done = CliRunner().invoke(app, arguments)
    told = CliRunner().invoke(app, [*arguments, "--json"])

    assert done.exit_code == told.exit_code == 0, done.output
    metrics = json.loads(told.stdout)["metrics"]
    shown = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines())
    for name, words in (
        ("perplexity", "Perplexity"), ("rouge_l", "ROUGE-L"), ("exact_match", "Exact match"),
    ):  # fmt: skip
        assert float(shown[words]) == pytest.approx(metrics[name], abs=1e-4)


def test_a_merged_model_predicts_what_its_adapter_does(chats: Chats) -> None:
    frame = pd.DataFrame(rows(8, seed=2)).drop(columns="response")
    found = predict(chats.merged, frame, device="cpu", eval_batch_size=3)
    wanted = predict(chats.adapter, frame, device="cpu", model=chats.base)
    assert found["answer"].tolist() == wanted["answer"].tolist()
    assert len({*found["answer"]}) > 3


def test_a_merged_model_uses_its_cache_again(chats: Chats) -> None:
    settings = [json.loads((f / "config.json").read_text()) for f in (chats.base, chats.merged)]
    assert [one["use_cache"] for one in settings] == [True, True]


def test_a_merged_model_is_not_merged_again(chats: Chats, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="a model that is merged already"):
        merge(chats.merged, tmp_path / "twice")
    with pytest.raises(InvalidValue, match="a file of labeled records"):
        evaluate(chats.merged, device="cpu")


def test_other_language_models_are_measured_after_a_merge_too(tmp_path: Path) -> None:
    base, data = make_checkpoint("bert", tmp_path / "base"), write_reviews(tmp_path / "films")
    config = text_config(base, data, input_columns="text", class_names="bad,good")
    task, adapted = exported(config, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", model=base)
    found = evaluate(tmp_path / "merged", data, test_split="validation", device="cpu")
    assert found.metrics == pytest.approx(task.evaluate(adapted.model, task.test_records()))
    assert found.classes == ("bad", "good")


def test_spans_of_questions_are_compared_after_a_merge_too(tmp_path: Path) -> None:
    base = make_checkpoint("bert", tmp_path / "base")
    file = tmp_path / "validation.jsonl"
    pd.DataFrame(questions.messy_rows(80)).to_json(file, orient="records", lines=True)
    config = text_config(base, tmp_path, task="question-answering")
    exported(config, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", model=base)
    told: dict[str, Any] = {"generation_limit": 60, "device": "cpu"}
    found = evaluate(tmp_path / "merged", file, **told).metrics
    assert found == pytest.approx(evaluate(tmp_path / "adapter", file, model=base, **told).metrics)
    assert 0 < found["rouge_l"] <= 1


def test_a_model_read_by_the_mean_is_loaded_by_hand_alone(tmp_path: Path) -> None:
    base, data = make_checkpoint("bert", tmp_path / "base"), write_reviews(tmp_path / "films")
    exported(text_config(base, data, pooling="mean"), tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", model=base)
    with pytest.raises(InvalidValue, match="of an adapter, or of a merged language model"):
        evaluate(tmp_path / "merged", data, test_split="validation")
