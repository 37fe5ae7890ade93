from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForQuestionAnswering

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.forecast.forecast import skeleton
from fedlora_flwr.forecast.memory import activation_bytes
from fedlora_flwr.lora.adapters import LoRASpec, attach
from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import prepare_run, run_in_process
from fedlora_flwr.tasks.registry import build_task
from tests.backbones import checkpoints
from tests.conftest import MakeConfig
from tests.tasks.questions import (
    LINE,
    NUMBERS,
    SPECIAL,
    Make,
    messy_rows,
    row,
)
from tests.tasks.tiny_tasks import WORDS, Row, fill

pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.mark.parametrize("model", SPECIAL)
def test_a_loss_is_that_of_transformers_on_the_record_alone(
    make_questions: Any, model: str
) -> None:
    task = make_questions(messy_rows(24), model, max_length=32)
    net = task.build_model().eval()
    records = task.client_records(0, 1)

    losses = task.losses(net, records.batch(torch.arange(24)))

    for i, loss in enumerate(losses):
        alone = records.batch(torch.tensor([i]))
        start, end = alone.pop("start"), alone.pop("end")
        expected = net(**alone, start_positions=start, end_positions=end).loss
        torch.testing.assert_close(loss, expected)


def test_losses_of_a_model_in_half_precision_are_in_full(make_questions: Any) -> None:
    task = make_questions(messy_rows(4))
    net = task.build_model().bfloat16()
    assert task.losses(net, task.client_records(0, 1).batch(torch.arange(4))).dtype == torch.float32


@pytest.mark.parametrize("model", SPECIAL)
def test_each_record_has_its_own_gradient(make_questions: Any, model: str) -> None:
    task = make_questions(messy_rows(12), model, max_length=32)
    records = task.client_records(0, 1)
    spec = LoRASpec(2, 4.0, 0.0, r".*\.(query|value)", task.head)
    adapted = attach(task.build_model(), spec, seed=1)
    fill(adapted.parameters)
    engine = PrivateEngine(adapted, task.losses)
    names = list(adapted.parameters)
    assert names[-2:] == ["qa_outputs.weight", "qa_outputs.bias"]

    engine.verify(records)
    found = engine.gradients_by_record(records, torch.arange(12), names)

    plain = attach(task.build_model(), spec, seed=1)
    fill(plain.parameters)
    for i in range(12):
        loss = task.losses(plain.model, records.batch(torch.tensor([i]))).sum()
        expected = torch.autograd.grad(loss, list(plain.parameters.values()))
        for name, gradient in zip(names, expected, strict=True):
            torch.testing.assert_close(found[name][i], gradient, rtol=1e-3, atol=1e-6)


def test_a_private_record_is_a_question_and_splits_are_measured_together(
    make_questions: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Some contexts are longer than what the tokenizer says that the model takes.
    rows = [*messy_rows(29), row(" ".join(WORDS * 2))]
    task = make_questions(rows, max_length=20)
    model = task.build_model()
    checkpoints.write_split(tmp_path / "set", "first", rows[:11])
    checkpoints.write_split(tmp_path / "set", "second", rows[11:])
    parts = make_questions(rows, max_length=20, test_split="first,second")

    assert len(task.client_records(0, 3)) == len(task.client_records(2, 3)) == 10
    assert len(task.test_records()) == len(parts.test_records()) > 30
    whole = task.evaluate(model, task.test_records())
    assert whole == task.evaluate(model.train(), task.test_records())
    assert parts.evaluate(model, parts.test_records()) == pytest.approx(whole)
    assert set(whole) == {"loss", "f1", "exact_match"}
    assert not caplog.records


def test_a_server_needs_no_private_split(make_questions: Any, tmp_path: Path) -> None:
    task = make_questions([row(LINE, (WORDS[0], 0))])
    (tmp_path / "set" / "train.jsonl").unlink()

    assert task.evaluate(task.build_model(), task.test_records())["f1"] <= 1
    with pytest.raises(InvalidValue, match="split = 'train'"):
        task.client_records(0, 1)


def test_records_are_split_by_any_column(make_questions: Any) -> None:
    rows = [{**row(LINE, (WORDS[0], 0)), "title": title} for title in "aabab"]

    task = make_questions(rows, partitioner="natural-id", partition_column="title")

    assert [len(task.client_records(i, 2)) for i in range(2)] == [3, 2]


def test_a_head_has_two_outputs_whatever_the_checkpoint_says(
    make_questions: Any, question_models: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(question_models["bert"], tmp_path / "classes")
    config = tmp_path / "classes" / "config.json"
    labels = {"id2label": {str(i): str(i) for i in range(5)}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **labels}))

    task = make_questions([row(LINE, (WORDS[0], 0))], tmp_path / "classes")

    assert task.head == ("qa_outputs",)
    assert task.build_model().qa_outputs.out_features == 2


@pytest.mark.parametrize(
    ("changes", "key", "allowed"),
    [
        ({"report_unprotected_metrics": True}, "report-unprotected-metrics", "one window"),
        ({"max_length": 11}, "max-length", "at least 12"),
        ({"max_length": 65}, "max-length", "at most 64"),
        ({"partitioner": "dirichlet"}, "partition-column", "partitioner = 'iid'"),
        ({"weights": "none"}, "weights", "'random'"),
    ],
)
def test_bad_settings_are_named(
    make_questions: Any, changes: dict[str, object], key: str, allowed: str
) -> None:
    def start() -> None:
        task = make_questions([row(LINE, (WORDS[0], 0))], **changes)
        task.build_model()
        task.client_records(0, 1)

    with pytest.raises(InvalidValue) as caught:
        start()

    assert caught.value.key == key
    assert allowed in caught.value.allowed


@pytest.mark.parametrize("column", ["question", "context", "answers"])
def test_a_data_set_of_another_layout_is_named(make_questions: Any, column: str) -> None:
    record = row(LINE, (WORDS[0], 0))
    del record[column]

    with pytest.raises(InvalidValue, match=r"dataset = .* columns question, context, answers"):
        make_questions([record]).client_records(0, 1)


def test_nothing_to_evaluate_is_refused(make_questions: Any) -> None:
    task = make_questions([row(LINE, (WORDS[0], 0))])
    with pytest.raises(InvalidValue, match="records"):
        task.evaluate(task.build_model(), task.test_records().subset(np.array([], dtype=np.int64)))


def test_what_a_model_cannot_read_is_refused_without_its_weights(make_questions: Make) -> None:
    task = make_questions([row(LINE, (WORDS[0], 0))], max_length=65)
    with pytest.raises(InvalidValue, match="max-length"):
        task.skeleton()


def test_memory_is_counted_without_weights(make_questions: Any) -> None:
    task = make_questions([row(LINE, (WORDS[0], 0))])
    adapted = skeleton(task._settings, task)

    sizes = [activation_bytes(task, adapted, task.largest_batch(n)) for n in (2, 4)]

    assert sizes[0] is not None
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.1)


def toy_rows(count: int, seed: int) -> list[Row]:
    """Return records whose answer is the one number in the context."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(4, 12))
        place = rng.randrange(len(words))
        words[place] = rng.choice(NUMBERS)
        begin = len(" ".join([*words[:place], ""]))
        rows.append(row(" ".join(words), (words[place], begin)))
    return rows


def test_a_private_run_learns_and_plain_peft_answers_like_it(
    make_config: MakeConfig,
    question_models: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    checkpoints.write_split(tmp_path / "set", "train", toy_rows(240, 0))
    checkpoints.write_split(tmp_path / "set", "validation", toy_rows(60, 1))
    config = make_config(
        task="question-answering",
        model=str(question_models["bert"]),
        dataset=str(tmp_path / "set"),
        max_length=32,
        strategy="ffa-lora",
        num_rounds=3,
        local_steps=4,
        optimizer="adamw",
        lr_b=0.02,
        lr_head=0.2,
    )
    run_dir = RunDirectory(tmp_path / "run")

    plan = prepare_run(config)
    assert "".join(capfd.readouterr()) == ""
    summary = run_in_process(plan, run_dir, lambda row: None)

    rows = run_dir.rows("rounds")
    assert min(mechanism.noise_multiplier for mechanism in plan.mechanisms) > 0.5
    assert rows[0]["f1"] < 0.3
    assert rows[-1]["f1"] > 0.6
    assert rows[-1]["exact_match"] > 0.5
    assert summary["status"] == "completed"
    base = AutoModelForQuestionAnswering.from_pretrained(question_models["bert"])
    plain = PeftModel.from_pretrained(base, str(run_dir.adapter))
    task = build_task(config.task, config)
    found = task.evaluate(plain, task.test_records())
    assert found == pytest.approx({name: rows[-1][name] for name in found}, rel=1e-5)
