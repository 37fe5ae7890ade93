from __future__ import annotations

import logging
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

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
from tests.tasks.conversations import LAYERS, Make, chat, messy_rows
from tests.tasks.tiny_tasks import WORDS, Row, all_records, fill

every_model = pytest.mark.parametrize("model", LAYERS)
pytestmark = pytest.mark.usefixtures("empty_cache")


@every_model
def test_a_loss_is_that_of_transformers_on_the_record_alone(make_chats: Make, model: str) -> None:
    task = make_chats(messy_rows(24), model, max_length=48)
    net = task.build_model().eval()
    records = task.client_records(0, 1)

    losses = task.losses(net, records.batch(torch.arange(24)))

    assert losses.dtype == torch.float32
    for loss, record in zip(losses, all_records(task), strict=True):
        if record.pop("answer_tokens"):
            torch.testing.assert_close(loss, net(**record).loss)
        else:
            assert loss == 0


@every_model
def test_each_record_has_its_own_gradient(make_chats: Make, model: str) -> None:
    task = make_chats(messy_rows(12), model, max_length=48)
    records = task.client_records(0, 1)
    spec = LoRASpec(2, 4.0, 0.0, LAYERS[model])
    adapted = attach(task.build_model(), spec, seed=1)
    fill(adapted.parameters)
    engine = PrivateEngine(adapted, task.losses)
    names = list(adapted.parameters)

    engine.verify(records)
    found = engine.gradients_by_record(records, torch.arange(12), names)

    plain = attach(task.build_model(), spec, seed=1)
    fill(plain.parameters)
    for i, record in enumerate(all_records(task)):
        loss = task.losses(plain.model, record).sum()
        expected = torch.autograd.grad(loss, list(plain.parameters.values()))
        for name, gradient in zip(names, expected, strict=True):
            torch.testing.assert_close(found[name][i], gradient, rtol=1e-3, atol=1e-5)
            assert gradient.any() == bool(record["answer_tokens"])
    # A step of records without answers only.
    empty = torch.tensor([i for i, r in enumerate(all_records(task)) if not r["answer_tokens"]])
    assert len(empty)
    alone = engine.gradients_by_record(records, empty, names)
    assert not any(gradient.any() for gradient in alone.values())


@every_model
@pytest.mark.parametrize("batch", [1, 7, 256])
def test_figures_are_those_of_a_loop_over_answer_tokens(
    make_chats: Make, model: str, batch: int
) -> None:
    task = make_chats(messy_rows(30), model, max_length=40, eval_batch_size=batch)
    net = task.build_model()
    net.train()
    shapes: list[tuple[int, int]] = []
    hook = net.register_forward_pre_hook(
        lambda _, __, inputs: shapes.append(inputs["input_ids"].shape), with_kwargs=True
    )

    measured = task.evaluate(net, task.test_records())

    hook.remove()
    # Records of like length come together.
    assert [width for _, width in shapes] == sorted(width for _, width in shapes)
    assert max(size for size, _ in shapes) == min(batch, 30)

    assert net.training
    net.eval()
    losses, hits = [], []
    for record in all_records(task, training=False):
        logits = net(record["input_ids"]).logits[0].detach()
        for position, label in enumerate(record["labels"][0].tolist()):
            if label != -100:
                losses.append(-F.log_softmax(logits[position - 1], -1)[label].item())
                hits.append(logits[position - 1].argmax().item() == label)
    assert measured["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert measured["token_accuracy"] == pytest.approx(np.mean(hits))


class Certain(nn.Module):
    """Holds one token for as good as certain."""

    def __init__(self, tokens: int, token: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(F.one_hot(torch.tensor(token), tokens) * 5e3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.scores.expand(*input_ids.shape, -1))


def test_a_perplexity_beyond_numbers_is_infinite(make_chats: Make) -> None:
    task = make_chats([chat(("user", "bali"), ("assistant", ""))])
    (record,) = all_records(task, training=False)
    answer = record["labels"][0, -2:].tolist()
    size = len(AutoTokenizer.from_pretrained(task._settings.model))

    wrong, right = (
        task.evaluate(Certain(size, token), task.test_records()) for token in (0, answer[-1])
    )

    assert wrong == {"loss": 5e3, "perplexity": math.inf, "token_accuracy": 0}
    assert right["token_accuracy"] == 0.5


def test_records_without_answers_count_as_records_and_are_reported(
    make_chats: Make, caplog: pytest.LogCaptureFixture
) -> None:
    # The first is beyond what the tokenizer says that the model takes.
    rows = [chat(("user", "bali " * 300), ("assistant", "yes")), chat(("user", "dona"))]
    task = make_chats([*rows, chat(("user", "bali"), ("assistant", "yes"))])

    with caplog.at_level(logging.WARNING):
        assert len(task.client_records(0, 1)) == 3
        task.client_records(0, 1)

    assert [record.getMessage() for record in caplog.records] == [
        "1 of 3 private records are longer than max-length = 64 tokens. The rest of each is cut "
        "off.",
        "2 of 3 private records have no answer within max-length = 64 tokens.",
    ]
    whole = task.evaluate(task.build_model(), task.test_records())
    last = task.test_records().subset(np.array([2]))
    assert whole == pytest.approx(task.evaluate(task.build_model(), last), rel=1e-6)
    with pytest.raises(InvalidValue, match="records with answers"):
        task.evaluate(task.build_model(), task.test_records().subset(np.array([0, 1])))
    with pytest.raises(InvalidValue, match="at least one record"):
        task.evaluate(task.build_model(), task.test_records().subset(np.array([], dtype=np.int64)))


def test_a_split_without_any_answer_is_refused_unless_it_is_private(
    make_chats: Make, caplog: pytest.LogCaptureFixture
) -> None:
    task = make_chats([chat(("user", "bali " * 90), ("assistant", "yes"))] * 3)
    with pytest.raises(InvalidValue, match=r"max-length = 64 .*'validation'"):
        all_records(task, training=False)
    # A run chooses the length: an error would tell it that no private answer begins within it.
    assert len(all_records(task)) == 3
    assert "3 of 3 private records have no answer" in caplog.text


@pytest.mark.parametrize(
    ("rows", "changes", "key", "allowed"),
    [
        ([{"prompt": "x"}], {}, "input-columns", "'prompt'"),
        (
            [{"prompt": "x", "response": "y"}],
            {"input_columns": "promt"},
            "input-columns",
            "'prompt'",
        ),
        ([chat(("user", "x"))], {"input_columns": "a,b,c"}, "input-columns", "two of text"),
        ([{"messages": "hello"}], {}, "input-columns", "lists of"),
        ([{"messages": [{"from": "user", "value": "x"}]}], {}, "input-columns", "lists of"),
        ([{"messages": []}], {}, "model", "accepts these conversations"),
        ([chat(("user", "x"))], {"max_length": 257}, "max-length", "at most 256"),
        (
            [chat(("user", "x"))],
            {"partitioner": "dirichlet"},
            "partition-column",
            "partitioner = 'iid'",
        ),
    ],
)
def test_bad_settings_are_named(
    make_chats: Make, rows: list[Row], changes: dict[str, object], key: str, allowed: str
) -> None:
    task = make_chats(rows, **changes)

    def start() -> None:
        task.build_model()
        task.client_records(0, 1)

    with pytest.raises(InvalidValue) as caught:
        start()

    assert caught.value.key == key
    assert allowed in caught.value.allowed


def test_a_server_needs_no_private_split(make_chats: Make, tmp_path: Path) -> None:
    task = make_chats([chat(("user", "bali"), ("assistant", "yes"))])
    (tmp_path / "set" / "train.jsonl").unlink()

    assert task.evaluate(task.build_model(), task.test_records())["token_accuracy"] <= 1
    with pytest.raises(InvalidValue, match="split = 'train'"):
        task.client_records(0, 1)


@every_model
def test_the_whole_model_is_frozen_but_for_adapters(make_chats: Make, model: str) -> None:
    task = make_chats([chat(("user", "x"), ("assistant", "y"))], model)
    net: Any = task.build_model()

    assert task.head == ()
    assert net.config.use_cache is False
    assert net(torch.ones(1, 3, dtype=torch.int64)).past_key_values is None
    adapted = attach(net, LoRASpec(2, 4.0, 0.0, task.lora_targets, task.head), seed=0)
    assert all("lora_" in name for name in adapted.parameters)


def test_what_a_model_cannot_read_is_refused_without_its_weights(make_chats: Make) -> None:
    task = make_chats([chat(("user", "x"), ("assistant", "y"))], max_length=257)
    with pytest.raises(InvalidValue, match="max-length"):
        task.skeleton()


def test_memory_is_counted_without_weights_for_as_many_answers_as_can_be(make_chats: Make) -> None:
    task = make_chats([chat(("user", "x"), ("assistant", "y"))])
    settings: Any = task._settings
    adapted = skeleton(settings, task)

    sizes = [activation_bytes(task, adapted, task.largest_batch(n)) for n in (2, 4)]

    logits = 4 * 63 * len(AutoTokenizer.from_pretrained(task._settings.model))
    assert sizes[0] is not None
    assert sizes[0] > 2 * logits
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.1)


class Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the shape of every fp32 tensor that is made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.dtype == torch.float32:
            self.shapes.append(tuple(made.shape))
        return made


def test_only_logits_of_answers_are_made_fp32(make_chats: Make) -> None:
    task = make_chats([chat(("user", "bali " * 50), ("assistant", "yes"))], max_length=200)
    net: Any = task.build_model().bfloat16()
    batch = task.client_records(0, 1).batch(torch.tensor([0]))

    with Made() as made:
        loss = task.losses(net, batch)

    assert loss.dtype == torch.float32
    # "yes", the end of the answer and of the line.
    wide = [shape for shape in made.shapes if shape[-1:] == (net.config.vocab_size,)]
    assert wide
    assert all(math.prod(shape[:-1]) == 3 for shape in wide)


def toy_rows(count: int, seed: int) -> list[Row]:
    rng = random.Random(seed)
    return [
        {"prompt": " ".join(rng.choices(WORDS, k=rng.randint(2, 5))), "response": "yes it is"}
        for _ in range(count)
    ]


def test_a_private_run_learns_and_plain_peft_answers_like_it(
    make_config: MakeConfig,
    chat_models: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    checkpoints.write_split(tmp_path / "set", "train", toy_rows(240, 0))
    checkpoints.write_split(tmp_path / "set", "validation", toy_rows(40, 1))
    config = make_config(
        task="instruction-tuning",
        model=str(chat_models["llama"]),
        dataset=str(tmp_path / "set"),
        strategy="ffa-lora",
        num_rounds=4,
        local_steps=4,
        optimizer="adamw",
        lr_b=0.1,
        lora_targets=LAYERS["llama"],
    )
    run_dir = RunDirectory(tmp_path / "run")

    plan = prepare_run(config)
    assert "".join(capfd.readouterr()) == ""
    summary = run_in_process(plan, run_dir, lambda row: None)

    rows = run_dir.rows("rounds")
    assert min(mechanism.noise_multiplier for mechanism in plan.mechanisms) > 0.5
    assert rows[0]["token_accuracy"] < 0.1
    assert rows[-1]["token_accuracy"] > 0.7
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    assert summary["status"] == "completed"
    base = AutoModelForCausalLM.from_pretrained(chat_models["llama"])
    plain = PeftModel.from_pretrained(base, str(run_dir.adapter))
    task = build_task(config.task, config)
    found = task.evaluate(plain, task.test_records())
    assert found == pytest.approx({name: rows[-1][name] for name in found}, rel=1e-4)
