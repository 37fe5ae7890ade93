from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image
from timm.models import save_for_hf
from transformers import AutoTokenizer, RobertaConfig

from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.recipes import RECIPES, load_recipe, recipe_names
from fedlora_flwr.config.sections import SECTIONS
from fedlora_flwr.forecast.forecast import forecast
from fedlora_flwr.privacy.budget import Segment, calibrate, epsilon_spent
from fedlora_flwr.privacy.calibration import calibrated_mechanism
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.server.strategy import build_strategy
from fedlora_flwr.simulations.runner import prepare_run, run_in_process
from fedlora_flwr.strategies import strategy_class
from tests.backbones import checkpoints

PAPER = [name for name in recipe_names() if name.startswith("paper/")]
RECORDS = {
    "sst2": 67_349,
    "qnli": 104_743,
    "qqp": 363_846,
    "mnli": 392_702,
    "snli": 549_367,
    "squad": 87_599,
    "squad2": 130_319,
    "cifar100": 50_000,
    "tiny-imagenet": 100_000,
}
# Published: q, steps, and σ at ε = 1, 2, 3, 6 and δ = 1e-5, of clients of one size.
PUBLISHED = {
    "paper/as-lora-cifar100-as-published": (0.00768, 1000, (1.182, 0.856, 0.745, 0.599)),
    "paper/as-lora-tiny-imagenet-as-published": (0.00384, 1000, (0.851, 0.703, 0.629, 0.515)),
    "paper/as-lora-sst2-as-published": (0.01140, 1000, (1.563, 1.026, 0.857, 0.668)),
    "paper/as-lora-mnli-as-published": (0.00196, 1000, (0.722, 0.620, 0.560, 0.460)),
    "paper/la-lora-swin-b-cifar100-as-published": (0.00256, 1000, (0.764, 0.649, 0.585, 0.480)),
}
# Adapted layers and blocks of the full models.
SHAPES = {
    "as-lora": (48, 24),
    "as-lora-vision": (48, 24),
    "la-lora-swin-t": (24, 12),
    "la-lora-swin-b": (48, 24),
    "la-lora": (72, 12),
    "ffa-lora": (48, 24),
    "fedsvd": (48, 24),
    "rolora": (48, 24),
}
WORDS = ["a bad film", "what a good film it was", "so dull that nobody laughed", "fine and warm"]
# A folder of timm's holds a Swin as deep in stages as the published ones, and as narrow as can be.
TINY = {
    "vit_large_patch16_224.orig_in21k": "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224.ms_in1k": "swin",
    "swin_base_patch4_window7_224.ms_in22k": "swin",
}
NARROW: dict[str, Any] = {
    "img_size": 56, "embed_dim": 24, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8],
}  # fmt: skip


def data_of(name: str) -> str:
    return max((key for key in RECORDS if f"-{key}" in name), key=len)


def kind_of(name: str) -> str:
    return name.removeprefix("paper/").split(f"-{data_of(name)}")[0]


def is_text(config: RunConfig) -> bool:
    return config.task != "image-classification"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return folders with the full RoBERTas' configurations, a tiny RoBERTa and a tiny Swin."""
    folder = tmp_path_factory.mktemp("models")
    tiny = checkpoints.roberta(folder / "tiny", WORDS)
    found = {"tiny": tiny, "swin": folder / "swin"}
    narrow = timm.create_model("swin_tiny_patch4_window7_224", **NARROW)
    save_for_hf(narrow, str(found["swin"]), model_args=NARROW)
    base = RobertaConfig(
        vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1
    )
    large = RobertaConfig(
        vocab_size=50_265,
        max_position_embeddings=514,
        type_vocab_size=1,
        pad_token_id=1,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
    )
    for name, config in (("roberta-base", base), ("roberta-large", large)):
        config.save_pretrained(folder / name)
        tokenizer = AutoTokenizer.from_pretrained(tiny, model_max_length=512)
        tokenizer.save_pretrained(folder / name)
        found[f"FacebookAI/{name}"] = folder / name
    return found


def test_each_published_protocol_has_its_recipes() -> None:
    named = {name.removeprefix("paper/") for name in PAPER}
    text = ("sst2", "qnli", "qqp", "mnli")
    expected = {f"{method}-{data}" for method in ("ffa-lora", "rolora") for data in text}
    expected |= {f"fedsvd-{data}" for data in (*text, "snli")}
    sets = ("cifar100", "tiny-imagenet")
    pictures = [f"{swin}-{data}" for swin in ("swin-t", "swin-b") for data in sets]
    expected |= {
        f"{name}-{version}"
        for name in (
            *(f"as-lora-{data}" for data in RECORDS),
            *(f"la-lora-{data}" for data in (*text, *pictures)),
        )
        for version in ("as-published", "as-coded")
    }
    assert named == expected


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_what_flwr_run_reads_and_says_what_it_is(name: str) -> None:
    text = (RECIPES / f"{name}.toml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    tables = tomllib.loads(text)
    own = [table for table in tables if table not in SECTIONS]
    assert list(tables) == [*(section for section in SECTIONS if section in tables), *own]
    assert all(strategy_class(table).name == table for table in own)
    assert all(
        isinstance(v, str | int | float) for table in tables.values() for v in table.values()
    )
    assert load_recipe(name).num_rounds >= 1


SOURCES = ("abstract", "code", "note", "ours")


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_says_where_each_value_comes_from(name: str) -> None:
    head: list[str] = []
    rows: list[str] = []
    for line in (RECIPES / f"{name}.toml").read_text(encoding="utf-8").splitlines():
        (rows if " = " in line else head).append(line)

    named = {row.rpartition("  # ")[2] for row in rows}
    assert named <= set(SOURCES)
    legend = " ".join(head)
    for source in named:
        assert f" {source}: " in legend, source
    # Nobody publishes how our simulation is repeated.
    assert "reproducible = true  # ours" in rows


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_budget_calibrates_to_the_published_noise(name: str) -> None:
    config, (rate, steps, sigmas) = load_recipe(name), PUBLISHED[name]
    mine = config.batch_size * config.num_clients / RECORDS[data_of(name)]
    assert mine == pytest.approx(rate, rel=0.005)
    assert config.planned_steps == steps
    for epsilon, sigma in zip((1.0, 2.0, 3.0, 6.0), sigmas, strict=True):
        assert calibrate(epsilon, 1e-5, mine, steps) == pytest.approx(sigma, rel=0.01)


def unlike(*keys: str) -> list[str]:
    """Return one paper recipe for each combination of these keys' values."""
    found: dict[tuple[object, ...], str] = {}
    for name in PAPER:
        values = load_recipe(name).items()
        found.setdefault(tuple(values[key] for key in keys), name)
    return list(found.values())


@pytest.mark.parametrize(
    "name", unlike("dataset", "dataset-subset", "num-clients", "batch-size", "local-steps")
)
def test_a_client_of_mean_size_can_keep_the_promise(name: str) -> None:
    config = load_recipe(name)
    mechanism = calibrated_mechanism(config, RECORDS[data_of(name)] // config.num_clients)
    if not config.private:
        assert name.startswith("paper/rolora")
        assert mechanism.noise_multiplier == 0
        return
    segment = Segment(mechanism.noise_multiplier, mechanism.sample_rate, config.planned_steps)
    assert 0.95 * config.epsilon < epsilon_spent([segment], config.delta).epsilon <= config.epsilon
    assert config.delta == 1e-5 or "promises nothing" in (RECIPES / f"{name}.toml").read_text()


@pytest.mark.parametrize("name", unlike("model", "task", "lora-targets", "train-head", "rank"))
def test_the_full_model_has_the_layers_and_blocks(name: str, models: dict[str, Path]) -> None:
    config = load_recipe(name)
    changes = [f"model={models[config.model]}"] if is_text(config) else []
    config = load_recipe(name, [*changes, "weights=random"])
    found = forecast(config, records=RECORDS[data_of(name)] // config.num_clients)
    kind = kind_of(name)
    shape = SHAPES[kind if is_text(config) or kind != "as-lora" else "as-lora-vision"]
    assert (found.layers, found.blocks) == shape
    assert found.broken == 0
    assert found.memory.activations is not None
    assert found.memory.backbone > {"as-lora": 1.2e9}.get(kind, 1e8)
    assert (found.noise_to_signal is None) == math.isinf(config.epsilon)


# What decides which code a step runs through.
PATHS = (
    "task", "model", "dataset", "strategy", "filter", "optimizer", "curvature", "share-head",
    "split-qkv", "train-head", "partitioner", "clip-norm", "lr-schedule", "weighting",
)  # fmt: skip


@pytest.mark.parametrize("name", unlike(*PATHS))
def test_a_shrunken_twin_takes_a_private_step(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    config = load_recipe(name)
    config = load_recipe(name, _shrunken(config, models, tmp_path))
    trainer = LocalTrainer.build(config)
    plan = build_strategy(config).plan(1, trainer.layout)
    records = trainer.task.client_records(0, 2)
    mechanism = calibrated_mechanism(config, len(records))
    update = trainer.train(trainer.start, plan, records, mechanism, ("client", 1))
    assert set(update.arrays) == set(trainer.layout.trained(plan, 1))
    moved = [
        not np.array_equal(array, trainer.start[name]) for name, array in update.arrays.items()
    ]
    assert all(moved) if config.private else any(moved)
    metrics = trainer.task.evaluate(trainer.adapted.model, trainer.task.test_records())
    assert 0 <= metrics[trainer.task.metric] <= 1


@pytest.mark.recipes
@pytest.mark.parametrize("name", PAPER)
def test_a_round_on_the_full_architecture(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    config = load_recipe(name)
    shrunken = _shrunken(config, models, tmp_path)
    # The architecture is the recipe's own; only weights, records and their number are not.
    kept = [text for text in shrunken if not text.startswith(("model=", "image-size="))]
    model = [f"model={models[config.model]}"] if is_text(config) else []
    config = load_recipe(name, [*kept, *model, "num-rounds=1", "max-rounds=0", "fraction-train=1"])
    run_dir = RunDirectory(tmp_path / "run")

    summary = run_in_process(prepare_run(config), run_dir, lambda row: None)

    assert (summary["status"], summary["failures"]) == ("completed", 0)
    assert all(math.isfinite(row["loss"]) for row in run_dir.rows("rounds"))
    spent = [row["epsilon"] for row in run_dir.rows("clients")]
    assert len(spent) == 2
    if config.private:
        assert all(0 < epsilon <= config.epsilon for epsilon in spent)


def _shrunken(config: RunConfig, models: dict[str, Path], folder: Path) -> list[str]:
    """Return overrides for two clients with a handful of records and a tiny model."""
    splits = [config.train_split, *config.test_split.split(",")]
    for split in splits:
        _write(config, folder / "set", split)
    tiny = "tiny" if is_text(config) else TINY[config.model]
    changes: dict[str, Any] = {
        "dataset": folder / "set",
        "dataset-subset": "",
        "model": models.get(tiny, tiny),
        "weights": "random",
        "image-size": 0 if is_text(config) else 56,
        "num-clients": 2,
        "partitioner": "iid",
        "min-records": 1,
        "batch-size": 2,
        "microbatch-size": 2,
        "local-steps": 1,
        "max-length": 48,
        "device": "cpu",
    }
    if not is_text(config):
        changes["image-size"] = 32 if config.model.startswith("vit") else 56
        changes["label-column"] = config.label_column
    return [f"{key}={value}" for key, value in changes.items()]


def _write(config: RunConfig, folder: Path, split: str) -> None:
    # Measuring a large model costs more than its one private step: four public records do.
    numbers = range(12 if split == config.train_split else 4)
    if config.task == "image-classification":
        import datasets

        pictures = [Image.new("RGB", (16, 16), (20 * n, 9 * n, 200)) for n in numbers]
        column = config.input_columns
        features = datasets.Features(
            {column: datasets.Image(), config.label_column: datasets.Value("int64")}
        )
        pairs = {column: pictures, config.label_column: list(numbers)}
        folder.mkdir(exist_ok=True)
        made = datasets.Dataset.from_dict(pairs, features=features)
        made.to_parquet(folder / f"{split}.parquet")
        return
    if config.task == "question-answering":
        answer = {"text": ["good film"], "answer_start": [7]}
        gone: dict[str, Any] = {"text": [], "answer_start": []}
        checkpoints.write_split(
            folder,
            split,
            [
                {
                    "id": str(n),
                    "question": "what was it?",
                    "context": WORDS[1],
                    "answers": gone if n % 3 == 0 and config.dataset.endswith("v2") else answer,
                }
                for n in numbers
            ],
        )
        return
    columns = config.input_columns.split(",")
    rows = [
        {**dict.fromkeys(columns, WORDS[n % 4]), config.label_column: n % config.num_classes}
        for n in numbers
    ]
    checkpoints.write_split(folder, split, rows)
