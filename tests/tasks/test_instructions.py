from __future__ import annotations

import logging
import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedlora_flwr.adapters import LoRASpec, attach
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.simulations.forecast import activation_bytes, skeleton
from fedlora_flwr.simulations.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import make_plan, run_in_process
from fedlora_flwr.tasks.instructions import InstructionTuning
from fedlora_flwr.tasks.registry import build_task
from tests.conftest import MakeConfig
from tests.tasks import checkpoints

WORDS = [a + b + c + d for a in "bdkm" for b in "ao" for c in "lnrs" for d in "iu"]
TEXTS = [" ".join([*WORDS, "yes it is", "system user assistant"])] * 3
LAYERS = {
    "llama": r".*\.(q_proj|v_proj|o_proj|up_proj|down_proj)",
    "gpt2": r".*\.(c_attn|c_proj|c_fc)",
}
every_model = pytest.mark.parametrize("model", LAYERS)
pytestmark = pytest.mark.usefixtures("empty_cache")

Row = dict[str, Any]
Make = Callable[..., InstructionTuning]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: getattr(checkpoints, name)(folder / name, TEXTS) for name in LAYERS}


@pytest.fixture
def make_task(models: dict[str, Path], tmp_path: Path) -> Make:
    """Return a function that writes records as both splits and makes the task on them."""

    def make(
        rows: Sequence[Row], model: str | Path = "llama", **changes: object
    ) -> InstructionTuning:
        for split in ("train", "validation"):
            checkpoints.write_split(tmp_path / "set", split, rows)
        dashed = {key.replace("_", "-"): value for key, value in changes.items()}
        start = {
            "model": str(models.get(str(model), model)),
            "dataset": str(tmp_path / "set"),
            "partitioner": "iid",
            "min-records": 1,
            "max-length": 64,
        }
        return InstructionTuning(RunConfig.of(start, dashed))

    return make


def chat(*turns: tuple[str, str]) -> Row:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def said(rng: random.Random) -> str:
    return " ".join(rng.choices([*WORDS, "naïve", "“x”", "km."], k=rng.randrange(8)))


def messy_rows(count: int) -> list[Row]:
    """Return conversations of all shapes, one or two of them without an answer."""
    rng, rows = random.Random(1), []
    for i in range(count):
        turns = [("system", said(rng))] if i % 3 == 0 else []
        for _ in range(i % 4):
            turns += [("user", said(rng)), ("assistant", said(rng))]
        rows.append(chat(*turns, *([("user", said(rng))] if i % 2 or not turns else [])))
    return rows


def all_records(task: InstructionTuning, training: bool = True) -> list[dict[str, Tensor]]:
    records = task.client_records(0, 1) if training else task.test_records()
    return [records.batch(torch.tensor([i])) for i in range(len(records))]


def by_prefixes(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Return tokens and labels, found by the tokens of ever longer conversations."""

    def tokens(count: int, **options: bool) -> list[int]:
        part = messages[:count]
        if not part:
            return list(tokenizer("<s><|assistant|>", add_special_tokens=False)["input_ids"])
        found = tokenizer.apply_chat_template(part, return_dict=False, **options)
        return list(found)

    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    whole = tokens(answers[-1] + 1 if answers else len(messages))
    labels = [-100] * len(whole)
    for i in answers:
        before, through = tokens(i, add_generation_prompt=True), tokens(i + 1)
        assert whole[: len(through)] == through
        assert through[: len(before)] == before
        labels[len(before) : len(through)] = through[len(before) :]
    return whole, labels


@every_model
@pytest.mark.parametrize("limit", [9, 64, 200])
def test_answers_are_what_ever_longer_conversations_add(
    make_task: Make, model: str, limit: int
) -> None:
    rows = messy_rows(40)
    task = make_task(rows, model, max_length=limit)
    tokenizer = AutoTokenizer.from_pretrained(task._settings.model)

    for row, record in zip(rows, all_records(task), strict=True):
        tokens, labels = by_prefixes(tokenizer, row["messages"])
        assert record["input_ids"].tolist() == [tokens[:limit]]
        assert record["labels"].tolist() == [labels[:limit]]
        assert record["attention_mask"].tolist() == [[1] * len(tokens[:limit])]
        assert record["answer_tokens"] == sum(label != -100 for label in labels[:limit])


def test_an_answer_ends_with_what_the_template_ends_it_with(make_task: Make) -> None:
    task = make_task([chat(("user", "bali"), ("assistant", "yes"), ("user", "dona"))])
    tokenizer = AutoTokenizer.from_pretrained(task._settings.model)
    (record,) = all_records(task)

    learnt = record["labels"][record["labels"] != -100]
    assert tokenizer.decode(learnt) == "yes<|end|>\n"
    assert tokenizer.decode(record["input_ids"][0]).endswith("yes<|end|>\n")


def test_a_token_on_the_border_is_the_answer_s(make_task: Make, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    folder = checkpoints.llama(tmp_path / "plain", ["assistant: bali"] * 9, template)
    task = make_task([chat(("user", "bali"), ("assistant", "bali"))], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (record,) = all_records(task)

    learnt = record["labels"][record["labels"] != -100]
    # The blank belongs to the prompt, and is one token with the word.
    assert tokenizer.decode(learnt) == " bali\n"


@pytest.mark.parametrize("chosen", ["", "messages", "talk", "prompt,response", "q, a"])
@pytest.mark.parametrize("layout", ["json", "parquet"])
def test_every_layout_of_conversations_is_read(
    make_task: Make, tmp_path: Path, chosen: str, layout: str
) -> None:
    rows = [
        chat(("user", "bali dona"), ("assistant", "yes")),
        chat(("user", "x"), ("assistant", "")),
    ]
    task = make_task(rows)
    expected = all_records(task)
    names = [name.strip() for name in chosen.split(",")] if chosen else ["messages"]
    for row in rows:
        messages = row.pop("messages")
        if len(names) == 2:
            row.update(
                {name: m["content"] or None for name, m in zip(names, messages, strict=True)}
            )
        else:
            row[names[0]] = [
                {**message, "content": message["content"] or None, "name": None}
                for message in messages
            ]
            row.update({"prompt": "not", "response": "this"})
    checkpoints.write_split(tmp_path / "set", "train", rows)
    if layout == "parquet":
        (tmp_path / "set" / "train.jsonl").unlink()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set" / "train.parquet")

    config = RunConfig.of(task._settings.items(), {"input-columns": chosen})  # type: ignore[attr-defined]
    found = all_records(InstructionTuning(config))

    assert [{k: v.tolist() for k, v in record.items()} for record in found] == [
        {k: v.tolist() for k, v in record.items()} for record in expected
    ]


@every_model
def test_a_loss_is_that_of_transformers_on_the_record_alone(make_task: Make, model: str) -> None:
    task = make_task(messy_rows(24), model, max_length=48)
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
def test_each_record_has_its_own_gradient(make_task: Make, model: str) -> None:
    task = make_task(messy_rows(12), model, max_length=48)
    records = task.client_records(0, 1)
    spec = LoRASpec(2, 4.0, 0.0, LAYERS[model])
    adapted = attach(task.build_model(), spec, seed=1)
    filled(adapted.parameters)
    engine = PrivateEngine(adapted, task.losses)
    names = list(adapted.parameters)

    engine.verify(records)
    found = engine.gradients_by_record(records, torch.arange(12), names)

    plain = attach(task.build_model(), spec, seed=1)
    filled(plain.parameters)
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


def filled(parameters: Mapping[str, nn.Parameter]) -> None:
    """Give adapters values at which no gradient is zero."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@every_model
@pytest.mark.parametrize("batch", [1, 7, 256])
def test_figures_are_those_of_a_loop_over_answer_tokens(
    make_task: Make, model: str, batch: int
) -> None:
    task = make_task(messy_rows(30), model, max_length=40, eval_batch_size=batch)
    net = task.build_model()
    net.train()

    measured = task.evaluate(net, task.test_records())

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


def test_a_perplexity_beyond_numbers_is_infinite(make_task: Make) -> None:
    task = make_task([chat(("user", "bali"), ("assistant", ""))])
    (record,) = all_records(task, training=False)
    answer = record["labels"][0, -2:].tolist()
    size = len(AutoTokenizer.from_pretrained(task._settings.model))

    wrong, right = (
        task.evaluate(Certain(size, token), task.test_records()) for token in (0, answer[-1])
    )

    assert wrong == {"loss": 5e3, "perplexity": math.inf, "token_accuracy": 0}
    assert right["token_accuracy"] == 0.5


def test_records_without_answers_count_as_records_and_are_reported(
    make_task: Make, caplog: pytest.LogCaptureFixture
) -> None:
    # The first is beyond what the tokenizer says that the model takes.
    rows = [chat(("user", "bali " * 300), ("assistant", "yes")), chat(("user", "dona"))]
    task = make_task([*rows, chat(("user", "bali"), ("assistant", "yes"))])

    with caplog.at_level(logging.WARNING):
        assert len(task.client_records(0, 1)) == 3
        task.client_records(0, 1)

    (message,) = [record.getMessage() for record in caplog.records]
    assert message == (
        "2 of 3 records of split 'train' have no answer within max-length = 64 tokens."
    )
    whole = task.evaluate(task.build_model(), task.test_records())
    last = task.test_records().subset(np.array([2]))
    assert whole == pytest.approx(task.evaluate(task.build_model(), last), rel=1e-6)
    with pytest.raises(InvalidValue, match="records with answers"):
        task.evaluate(task.build_model(), task.test_records().subset(np.array([0, 1])))
    with pytest.raises(InvalidValue, match="records with answers"):
        task.evaluate(task.build_model(), task.test_records().subset(np.array([], dtype=np.int64)))


@pytest.mark.parametrize("training", [True, False])
def test_a_split_without_any_answer_is_refused(make_task: Make, training: bool) -> None:
    task = make_task([chat(("user", "bali " * 90), ("assistant", "yes"))] * 3)
    with pytest.raises(InvalidValue, match=r"max-length = 64 .*'(train|validation)'"):
        all_records(task, training)


def test_a_template_that_adds_nothing_of_its_own(make_task: Make, tmp_path: Path) -> None:
    bare = "{% for m in messages %}{{ m.content }}{% endfor %}"
    folder = checkpoints.llama(tmp_path / "bare", TEXTS, bare)
    rows = [chat(("user", ""), ("assistant", answer)) for answer in ("", "bali dona")]
    task = make_task(rows, folder)

    first, second = all_records(task)

    assert first["input_ids"].tolist() == [[1]]
    assert first["labels"].tolist() == [[-100]]
    assert task.losses(task.build_model(), first) == 0
    # Nothing comes before the second's answer to predict its first token from.
    tokens = second["input_ids"][0].tolist()
    assert second["labels"].tolist() == [[-100, *tokens[1:]]]
    assert second["answer_tokens"] == len(tokens) - 1 > 0


CHANGING = "{{ messages | length }}" + checkpoints.CHAT_TEMPLATE
LAST_ONLY = (
    "{% for m in messages %}{{ m.role }}{{ m.content }}"
    "{% if loop.last and m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
)
REFUSING = "{{ raise_exception('Users come first.') }}"


@pytest.mark.parametrize(
    ("template", "turns", "allowed"),
    [
        (None, ["user", "assistant"], "has a chat template"),
        (CHANGING, ["user", "assistant"], "1 messages before an answer"),
        (LAST_ONLY, ["assistant", "assistant"], "takes these conversations (Cannot"),
        (REFUSING, ["user", "assistant"], "takes these conversations (Users come first.)"),
    ],
)
def test_a_template_that_does_not_serve_is_named(
    make_task: Make, tmp_path: Path, template: str | None, turns: list[str], allowed: str
) -> None:
    folder = checkpoints.llama(tmp_path / "other", TEXTS, template)
    task = make_task([chat(*((role, "bali") for role in turns))], folder)

    with pytest.raises(InvalidValue) as caught:
        task.client_records(0, 1)

    assert (caught.value.key, caught.value.value) == ("model", str(folder))
    assert allowed in caught.value.allowed


def test_a_template_that_ends_only_the_last_answer_serves_single_answers(
    make_task: Make, tmp_path: Path
) -> None:
    folder = checkpoints.llama(tmp_path / "last", TEXTS, LAST_ONLY)
    turns = [("user", "bali"), ("assistant", "yes")]
    assert all_records(make_task([chat(*turns)], folder))[0]["answer_tokens"] > 1
    with pytest.raises(InvalidValue, match="only ever adds"):
        make_task([chat(*turns, *turns)], folder).client_records(0, 1)


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
        ([{"messages": []}], {}, "model", "takes these conversations"),
        ([chat(("user", "x"))], {"max_length": 257}, "max-length", "at most 256"),
        ([chat(("user", "x"))], {"partitioner": "dirichlet"}, "partition-column", "one of"),
    ],
)
def test_bad_settings_are_named(
    make_task: Make, rows: list[Row], changes: dict[str, object], key: str, allowed: str
) -> None:
    task = make_task(rows, **changes)

    def start() -> None:
        task.build_model()
        task.client_records(0, 1)

    with pytest.raises(InvalidValue) as caught:
        start()

    assert caught.value.key == key
    assert allowed in caught.value.allowed


def test_a_length_template_or_special_token_of_its_own_makes_other_records(
    make_task: Make, models: dict[str, Path], tmp_path: Path, empty_cache: Path
) -> None:
    rows = messy_rows(8)
    expected = [record["input_ids"].tolist() for record in all_records(make_task(rows))]
    short = all_records(make_task(rows, max_length=9))
    assert max(record["input_ids"].shape[1] for record in short) == 9
    changes = {
        "chat_template.jinja": ("<|end|>", "</s>"),
        "tokenizer_config.json": ('"bos_token": "<s>"', '"bos_token": "</s>"'),
    }
    for name, change in changes.items():
        folder = tmp_path / name
        shutil.copytree(models["llama"], folder)
        text = (folder / name).read_text()
        assert change[0] in text
        (folder / name).write_text(text.replace(*change))
        found = all_records(make_task(rows, folder))
        assert [record["input_ids"].tolist() for record in found] != expected
    made = len([*empty_cache.glob("fedlora/datasets/*.lock")])
    all_records(make_task(rows))
    assert len([*empty_cache.glob("fedlora/datasets/*.lock")]) == made == 4


def test_a_server_needs_no_private_split(make_task: Make, tmp_path: Path) -> None:
    task = make_task([chat(("user", "bali"), ("assistant", "yes"))])
    (tmp_path / "set" / "train.jsonl").unlink()

    assert task.evaluate(task.build_model(), task.test_records())["token_accuracy"] <= 1
    with pytest.raises(InvalidValue, match="split = 'train'"):
        task.client_records(0, 1)


@every_model
def test_the_whole_model_is_frozen_but_for_adapters(make_task: Make, model: str) -> None:
    task = make_task([chat(("user", "x"), ("assistant", "y"))], model)
    net: Any = task.build_model()

    assert task.head == ()
    assert net.config.use_cache is False
    assert net(torch.ones(1, 3, dtype=torch.int64)).past_key_values is None
    adapted = attach(net, LoRASpec(2, 4.0, 0.0, task.lora_targets, task.head), seed=0)
    assert all("lora_" in name for name in adapted.parameters)


def test_memory_is_counted_without_weights_for_as_many_answers_as_can_be(make_task: Make) -> None:
    task = make_task([chat(("user", "x"), ("assistant", "y"))])
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


def test_only_logits_of_answers_are_made_fp32(make_task: Make) -> None:
    task = make_task([chat(("user", "bali " * 50), ("assistant", "yes"))], max_length=200)
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
    models: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    checkpoints.write_split(tmp_path / "set", "train", toy_rows(240, 0))
    checkpoints.write_split(tmp_path / "set", "validation", toy_rows(40, 1))
    config = make_config(
        task="instruction-tuning",
        model=str(models["llama"]),
        dataset=str(tmp_path / "set"),
        strategy="ffa-lora",
        num_rounds=4,
        local_steps=4,
        optimizer="adamw",
        lr_b=0.1,
        lora_targets=LAYERS["llama"],
    )
    run_dir = RunDirectory(tmp_path / "run")

    plan = make_plan(config)
    assert "".join(capfd.readouterr()) == ""
    summary = run_in_process(plan, run_dir, lambda row: None)

    rows = run_dir.rows("rounds")
    assert min(mechanism.noise_multiplier for mechanism in plan.mechanisms) > 0.5
    assert rows[0]["token_accuracy"] < 0.1
    assert rows[-1]["token_accuracy"] > 0.7
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    assert summary["status"] == "completed"
    base = AutoModelForCausalLM.from_pretrained(models["llama"])
    plain = PeftModel.from_pretrained(base, str(run_dir.adapter))
    task = build_task(config.task, config)
    found = task.evaluate(plain, task.test_records())
    assert found == pytest.approx({name: rows[-1][name] for name in found}, rel=1e-4)
