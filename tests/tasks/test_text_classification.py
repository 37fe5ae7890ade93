from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import factor_of
from fedlora_flwr.plan import BOTH, ComponentPlan
from fedlora_flwr.privacy.engine import OptimizerSettings
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.microbatches import PASS_COST
from fedlora_flwr.privacy.noise import SeededNoise
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import prepare_run, run_in_process
from fedlora_flwr.tasks.text_classification import TextClassification
from tests.backbones import checkpoints
from tests.tasks.texts import (
    TARGETS,
    fill,
    gradients_alone,
    plain_twin,
    reviews,
    set_in_config,
    text_config,
    write_reviews,
)

Checkpoint = Callable[[str], Path]
every_kind = pytest.mark.parametrize("kind", TARGETS)
# Of each kind: head, adapted layers, and inputs beside the tokens and their mask.
SHAPES: dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]] = {
    "bert": (("classifier",), 4, ("token_type_ids",)),
    "roberta": (("classifier",), 4, ()),
    "distilbert": (("pre_classifier", "classifier"), 4, ()),
    # One layer that runs three times.
    "albert": (("classifier",), 2, ("token_type_ids",)),
    # Its head has a normalization that is not clipped record by record, and so does not train.
    "modernbert": (("head.dense", "classifier"), 2, ()),
    "llama": (("score",), 4, ()),
    # Its tokenizer names token types, which the model would take for words.
    "gpt2": (("score",), 2, ()),
}
PLAIN = OptimizerSettings("sgd", lr_a=1.0, lr_b=1.0, lr_head=1.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("reviews"))


@pytest.fixture
def make_trainer(
    checkpoint: Checkpoint, data: Path, empty_cache: Path
) -> Callable[..., tuple[LocalTrainer, TextClassification]]:
    def make(kind: str, **changes: Any) -> tuple[LocalTrainer, TextClassification]:
        config = text_config(checkpoint(kind), data, **changes)
        task = TextClassification(config)
        trainer = LocalTrainer.build(config, task)
        fill(trainer.adapted)
        return trainer, task

    return make


Make = Callable[..., tuple[LocalTrainer, TextClassification]]


@every_kind
def test_each_family_has_its_usual_layers_head_and_inputs(make_trainer: Make, kind: str) -> None:
    trainer, task = make_trainer(kind)
    head, layers, inputs = SHAPES[kind]
    records = task.client_records(0, 3)
    batch = records.batch(torch.arange(4))

    assert task.head == head
    assert len(trainer.adapted.layers) == layers
    trained = [name for name in trainer.layout.names if factor_of(name) is None]
    assert all(any(name.startswith(f"{part}.") for part in head) for name in trained)
    assert len(trained) >= len(head)
    assert list(batch) == ["input_ids", "attention_mask", *inputs, "label"]
    largest = task.largest_batch(5)
    assert list(largest) == list(batch)
    assert largest["input_ids"].shape == (5, 32)
    assert largest["label"].shape == (5,)
    trainer.engine.verify(records)


@pytest.mark.parametrize("pooling", ["model", "mean"])
@every_kind
def test_a_record_has_its_own_loss_and_gradient_in_any_batch(
    make_trainer: Make, kind: str, pooling: str
) -> None:
    trainer, task = make_trainer(kind, pooling=pooling)
    records, names = task.client_records(0, 3), list(trainer.adapted.parameters)
    assert records.lengths is not None
    by_length = torch.from_numpy(records.lengths[:8].argsort())
    assert records.lengths[by_length[-1]] > records.lengths[by_length[0]]
    twin = plain_twin(task, trainer.adapted, TARGETS[kind])
    expected = gradients_alone(task, twin, records, by_length)

    found = trainer.engine.gradients_by_record(records, by_length, names)

    for name in names:
        norms = expected[name].flatten(1).norm(dim=1)
        gaps = (found[name] - expected[name]).flatten(1).norm(dim=1)
        assert bool((gaps <= 3e-5 * norms.max() + 1e-9).all()), name
    padded = {
        name: torch.nn.functional.pad(tensor, (0, 9 * (tensor.ndim - 1)), value=fill)
        for name, fill in (
            ("input_ids", task._tokenizer.pad_token_id),
            *((name, 0) for name in task._inputs[1:]),
            ("label", 0),
        )
        for tensor in [records.batch(by_length)[name]]
    }
    with torch.no_grad():
        alone = torch.cat([task.losses(twin, records.batch(i.view(1))) for i in by_length])
        losses = task.losses(twin, padded)
    torch.testing.assert_close(losses, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
def test_cuts_by_length_change_the_clipped_sum_by_rounding_only(
    make_trainer: Make, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, task = make_trainer(kind)
    records, names = task.client_records(0, 2), list(trainer.adapted.parameters)
    start = {name: p.detach().clone() for name, p in trainer.adapted.parameters.items()}
    steps, widths = [], []

    def losses(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        widths.append(batch["input_ids"].shape[1])
        return task.losses(model, batch)

    for size, cost in ((1, 10**6), (20, 1)):
        monkeypatch.setitem(PASS_COST, "cpu", cost)
        widths.clear()
        with torch.no_grad():
            for name, p in trainer.adapted.parameters.items():
                p.copy_(start[name])
        trainer.engine._verified, trainer.engine._losses = True, losses
        trainer.engine.start_round(Mechanism(0.0, 0.5, size, 30), PLAIN, SeededNoise(0))
        trainer.engine.step(records, torch.arange(20), names)
        moved = {n: start[n] - p.detach() for n, p in trainer.adapted.parameters.items()}
        steps.append({name: size * tensor for name, tensor in moved.items()})
        assert len(set(widths)) == 1 if cost > 1 else len(set(widths)) > 2

    for name in names:
        scale = steps[0][name].abs().max().item()
        assert scale > 1e-4, name
        # A parameter is rounded when it moves, and the wider step is that difference times 20.
        rounding = 20 * torch.finfo(torch.float32).eps * start[name].abs().max().item()
        atol = 1e-3 * scale + rounding
        assert atol < 0.02 * scale, name
        torch.testing.assert_close(steps[1][name], steps[0][name], rtol=0, atol=atol)


DROPS = ["hidden_dropout_prob", "attention_probs_dropout_prob"]


@pytest.mark.parametrize(
    ("drops", "backbone", "adapters", "same"),
    [
        (DROPS[:1], True, 0.0, False),
        (DROPS[1:], True, 0.0, False),
        (DROPS, False, 0.0, True),
        (DROPS, False, 0.5, False),
        ([], True, 0.5, False),
    ],
    ids=["units", "attention", "off", "adapters' own", "adapters' own beside a backbone without"],
)
def test_dropout_of_backbone_and_adapters_are_apart(
    checkpoint: Checkpoint,
    data: Path,
    empty_cache: Path,
    drops: list[str],
    backbone: bool,
    adapters: float,
    same: bool,
) -> None:
    folder = shutil.copytree(checkpoint("bert"), empty_cache / "model")
    set_in_config(folder, **dict.fromkeys(drops, 0.5))
    config = text_config(folder, data, backbone_dropout=backbone, lora_dropout=adapters)
    trainer = LocalTrainer.build(config)
    fill(trainer.adapted)
    start, records = trainer.adapted.read(), trainer.task.client_records(0, 3)
    count = len(records)

    def train(client: str) -> dict[str, Any]:
        # Every record in every step, and no noise: what differs, dropout has drawn.
        mechanism = Mechanism(0.0, 1.0, count, count)
        plan = ComponentPlan.uniform(BOTH)
        return dict(trainer.train(start, plan, records, mechanism, (client, 0)).arrays)

    first, second = train("a"), train("b")

    assert all((first[name] == second[name]).all() for name in first) is same


def test_a_private_run_learns_and_spends_its_budget(
    checkpoint: Checkpoint, empty_cache: Path, tmp_path: Path
) -> None:
    config = text_config(
        checkpoint("distilbert"),
        write_reviews(tmp_path / "many", train=1500, test=100),
        num_clients=2,
        num_rounds=2,
        local_steps=6,
        batch_size=128,
        strategy="ffa-lora",
        lr_b=0.5,
        lr_head=1.0,
        epsilon=8.0,
        delta=1e-4,
        pooling="mean",
    )
    rows: list[Any] = []
    summary = run_in_process(prepare_run(config), RunDirectory(tmp_path / "run"), rows.append)

    assert summary["status"] == "completed"
    assert 7.8 < summary["epsilon_max"] <= 8
    assert rows[0]["accuracy"] < 0.7
    assert rows[-1]["accuracy"] > rows[0]["accuracy"] + 0.15
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bert", {}),
        ("roberta", {"rslora": True}),
        ("roberta", {"pooling": "mean", "lora_dropout": 0.3}),
        ("distilbert", {}),
        ("modernbert", {"pooling": "mean", "rslora": True}),
        ("modernbert", {}),
        ("albert", {}),
        ("llama", {"lora_dropout": 0.1}),
        ("gpt2", {}),
    ],
)
def test_plain_peft_loads_the_export_and_predicts_the_same(
    make_trainer: Make, kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    trainer, task = make_trainer(kind, **changes)
    batch = task.test_records().batch(torch.arange(20))
    trainer.adapted.export(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    loaded = PeftModel.from_pretrained(task.build_model(), str(tmp_path / "adapter")).eval()

    with torch.no_grad():
        ours, theirs = (task._logits(model, batch) for model in (trainer.adapted.model, loaded))
        bare = task._logits(task.build_model().eval(), batch)

    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - bare).abs().max() > 0.01
    # ModernBERT's head has a normalization, which does not train and is in no checkpoint either.
    frozen = ["head.norm"] if (kind, changes) == ("modernbert", {}) else []
    assert saved["modules_to_save"] == [*task.head, *frozen]
    assert saved["lora_dropout"] == changes.get("lora_dropout", 0.0)
    spread = math.sqrt(3) if changes.get("rslora") else 3
    assert trainer.adapted.layers[0].scaling == pytest.approx(8 / spread)


def test_a_trained_head_is_drawn_by_the_seed_and_a_frozen_one_too(make_trainer: Make) -> None:
    trainer, task = make_trainer("roberta", train_head=False)
    assert not trainer.adapted.head
    assert all(factor_of(name) for name in trainer.layout.names)
    other = TextClassification(
        text_config(task._settings.model, Path(task._settings.dataset), seed=43)
    )
    again, first, second = (t.build_model().state_dict() for t in (task, task, other))
    drawn = [name for name in first if not torch.equal(first[name], second[name])]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert drawn == ["classifier.dense.weight", "classifier.out_proj.weight"]


PAIR = [
    {"first": "the film was so fine", "second": "a great film", "label": 1, "id": 7},
    {"first": "the film", "second": "dull", "label": 0, "id": 8},
    {"first": "", "second": None, "label": 0, "id": 9},
]


def test_pairs_of_texts_are_told_apart_and_cut_to_the_length(
    checkpoint: Checkpoint, tmp_path: Path, empty_cache: Path
) -> None:
    long = {"first": "very " * 30, "second": "so so", "label": 1, "id": 1}
    checkpoints.write_split(tmp_path / "set", "train", [*PAIR, long])

    def make(**changes: Any) -> TextClassification:
        config = text_config(checkpoint("bert"), tmp_path / "set", max_length=16, **changes)
        return TextClassification(config)

    task = make()
    batch = task.client_records(0, 1).batch(torch.arange(4))
    words = task._tokenizer.get_vocab()

    assert batch["attention_mask"].sum(1).tolist() == [11, 6, 3, 16]
    assert batch["token_type_ids"][0].tolist() == [0] * 7 + [1] * 4 + [0] * 5
    assert batch["input_ids"][1].tolist()[:7] == [
        words[w] for w in ("[CLS]", "the", "film", "[SEP]", "dull", "[SEP]", "[PAD]")
    ]
    # The longer of the two loses more.
    assert batch["input_ids"][3].tolist()[-4:] == [words[w] for w in ("[SEP]", "so", "so", "[SEP]")]
    swapped = make(input_columns="second, first").client_records(0, 1).batch(torch.tensor([1]))
    assert swapped["input_ids"][0].tolist() == [
        words[w] for w in ("[CLS]", "dull", "[SEP]", "the", "film", "[SEP]")
    ]
    one = make(input_columns="first").client_records(0, 1)
    assert one.lengths is not None
    assert one.lengths.tolist() == [7, 4, 2, 16]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_empty_text_is_a_record_like_any_other(
    checkpoint: Checkpoint, kind: str, tmp_path: Path, empty_cache: Path
) -> None:
    rows = [{"text": "", "label": 0}, {"text": None, "label": 1}, *reviews(4)]
    checkpoints.write_split(tmp_path / "set", "train", rows)
    folder = Path(shutil.copytree(checkpoint(kind), tmp_path / "model"))
    # As GPT-2's own, a tokenizer that adds nothing to a text.
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    trainer = LocalTrainer.build(text_config(folder, tmp_path / "set"))
    records = trainer.task.client_records(0, 1)

    assert trainer.task._tokenizer("").input_ids == []  # type: ignore[attr-defined]
    assert records.lengths.tolist()[:2] == [1, 1]  # type: ignore[attr-defined]
    trainer.engine.verify(records)
    losses = [
        trainer.task.losses(trainer.adapted.model, records.batch(torch.tensor(indices)))[0]
        for indices in ([0], [0, 3])
    ]
    assert torch.isfinite(losses[0])
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize(
    ("changes", "key", "allowed"),
    [
        ({"input_columns": "txt"}, "input-columns", "did you mean 'text'"),
        ({"input_columns": "label"}, "input-columns", "one of 'other', 'text', 'writer'"),
        ({"input_columns": "text,writer,other"}, "input-columns", "one or two of"),
        ({"input_columns": ""}, "input-columns", "one or two of ['text', 'writer', 'other']"),
        ({"max_length": 65}, "max-length", "at most 64"),
    ],
)
def test_columns_and_lengths_that_cannot_be_read_are_named(
    checkpoint: Checkpoint,
    changes: dict[str, Any],
    key: str,
    allowed: str,
    tmp_path: Path,
    empty_cache: Path,
) -> None:
    rows = [{**row, "writer": "me", "other": "x"} for row in reviews(4)]
    checkpoints.write_split(tmp_path / "set", "train", rows)
    config = text_config(checkpoint("roberta"), tmp_path / "set", **changes)
    with pytest.raises(InvalidValue) as caught:
        LocalTrainer.build(config).task.client_records(0, 1)
    assert caught.value.key == key
    assert allowed in str(caught.value)
    if key == "max-length":
        with pytest.raises(InvalidValue, match="max-length"):
            TextClassification(config).skeleton()


def test_a_column_to_split_by_is_no_text_to_read(
    checkpoint: Checkpoint, tmp_path: Path, empty_cache: Path
) -> None:
    rows = [{**row, "writer": f"w{i % 2}"} for i, row in enumerate(reviews(10))]
    checkpoints.write_split(tmp_path / "set", "train", rows)
    split = {"partitioner": "natural-id", "partition_column": "writer", "num_clients": 2}
    task = TextClassification(text_config(checkpoint("bert"), tmp_path / "set", **split))

    parts = [task.client_records(client, 2) for client in range(2)]

    assert [len(part) for part in parts] == [5, 5]
    labels = parts[1].batch(torch.arange(5))["label"].tolist()
    assert labels == [row["label"] for row in rows[1::2]]
    assert parts[0].batch(torch.tensor([0]))["token_type_ids"].sum() == 0
