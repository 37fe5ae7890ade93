"""The final model alone: canaries that its loss can show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora_flwr.audit.canaries import LABEL, TOKENS, AuditRecords, Canaries
from fedlora_flwr.audit.record import BLACK_BOX, VIOLATED
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.lora.build import build_adapted
from fedlora_flwr.tasks.registry import build_task
from tests.audit.attacks import RECORDS, attacked, settings, without_noise
from tests.backbones import checkpoints
from tests.tasks.conversations import TEXTS, chat
from tests.tasks.tiny_tasks import WORDS

# Small steps, so that the loss is nearly a linear function of what was learned.
RATES: dict[str, Any] = {"lr_a": 0.01, "lr_b": 0.01, "lr_head": 0.01}


def test_a_wrong_label_is_found_in_a_model_without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = attacked(100, mode=BLACK_BOX, kind=LABEL, num_clients=2, **RATES)
    assert honest.verdict != VIOLATED
    assert honest.counts.absent + honest.counts.present == 100
    without_noise(monkeypatch)
    broken = attacked(100, mode=BLACK_BOX, kind=LABEL, num_clients=2, **RATES)
    assert broken.verdict == VIOLATED


def test_a_wrong_label_changes_the_label_alone() -> None:
    config = settings()
    task = build_task(config.task, config)
    own = task.client_records(0, config.num_clients)
    canaries = Canaries.of(LABEL, task, torch.nn.Module())
    records = AuditRecords(own, RECORDS, canaries, [True])
    mine, real = records.batch(torch.arange(RECORDS)), own.batch(torch.arange(RECORDS))
    assert torch.equal(mine["image"], real["image"])
    assert mine["label"][0] == (real["label"][0] + 1) % 10
    assert torch.equal(mine["label"][1:], real["label"][1:])


def test_a_text_of_random_tokens_keeps_its_length_and_is_learned_as_a_whole(
    conversations: Path,
) -> None:
    config = settings("llm-benchmark", **tiny(conversations))
    task = build_task(config.task, config)
    canaries = Canaries.of(TOKENS, task, build_adapted(config, task).model)
    own = task.client_records(0, config.num_clients)
    records = AuditRecords(own, RECORDS, canaries, [True], first=7)
    alone, together = (records.batch(torch.arange(n)) for n in (1, RECORDS))
    length = int(alone["attention_mask"].sum())
    assert alone["input_ids"].shape == own.batch(torch.arange(1))["input_ids"].shape
    assert not torch.equal(alone["input_ids"], own.batch(torch.arange(1))["input_ids"])
    assert torch.equal(alone["labels"][0, :length], alone["input_ids"][0, :length])
    # The same tokens, however the batch around them is padded.
    assert torch.equal(together["input_ids"][0, :length], alone["input_ids"][0, :length])
    assert (together["labels"][0, length:] == -100).all()


def test_a_task_without_labels_or_tokens_refuses_such_canaries(conversations: Path) -> None:
    config = settings("llm-benchmark", **tiny(conversations))
    with pytest.raises(InvalidValue, match="canary"):
        Canaries.of(LABEL, build_task(config.task, config), torch.nn.Module())
    with pytest.raises(InvalidValue, match="canary"):
        Canaries.of(TOKENS, build_task("digits", settings()), torch.nn.Module())


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conversations")
    checkpoints.llama(folder / "model", TEXTS)
    rows = [chat(("user", f"is it {word}"), ("assistant", f"yes it is {word}")) for word in WORDS]
    for split in ("train", "validation"):
        checkpoints.write_split(folder / "data", split, rows)
    return folder


def tiny(folder: Path) -> dict[str, Any]:
    return {
        "strategy": "dp-lora", "model": str(folder / "model"), "dataset": str(folder / "data"),
        "dataset_subset": "", "test_split": "validation", "max_length": 64, "precision": "fp32",
        "num_clients": 2, "partitioner": "iid", "partition_column": "", "min_records": 1,
        "train_limit": 0, "test_limit": 0, "rank": 2, "microbatch_size": 0,
    }  # fmt: skip
