from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.cli.run_screen import describe_plan
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue, ModelFailed, PrivacyViolation
from fedlora_flwr.forecast.forecast import forecast
from fedlora_flwr.lora.build import build_adapted
from fedlora_flwr.server import rehearsal
from fedlora_flwr.server.rehearsal import rehearse
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import prepare_run, run_in_process
from fedlora_flwr.tasks.digits import DigitsTask
from fedlora_flwr.tasks.registry import build_task
from tests.backbones import checkpoints
from tests.conftest import MakeConfig
from tests.data.pictures import image_config
from tests.simulations import families
from tests.tasks.texts import text_config, write_reviews

# What each family cannot do, and the words that say so. All else trains.
NOT_FOR = "a model for this task"
NOTHING_USUAL = "has no usual layers"
REFUSED = {
    ("Albert", "chat"): NOT_FOR,
    ("Deberta", "chat"): NOT_FOR,
    ("DebertaV2", "chat"): NOT_FOR,
    ("DistilBert", "chat"): NOT_FOR,
    ("Gemma2", "answers"): NOT_FOR,
    ("Mamba", "model"): NOT_FOR,
    ("Mamba", "mean"): NOTHING_USUAL,
    ("Mamba", "answers"): NOT_FOR,
    ("Mamba", "chat"): NOTHING_USUAL,
    ("MobileBert", "chat"): NOT_FOR,
    ("ModernBert", "chat"): NOT_FOR,
    ("MPNet", "chat"): NOT_FOR,
    ("Olmo2", "answers"): NOT_FOR,
    ("Phi", "answers"): NOT_FOR,
    ("Phi3", "answers"): NOT_FOR,
    ("T5", "mean"): "pooling = 'mean' cannot be used: expected 'model'",
    ("T5", "chat"): NOT_FOR,
    **{("XLNet", task): NOTHING_USUAL for task in ("model", "mean", "answers", "chat")},
}
TASKS: dict[str, dict[str, Any]] = {
    "model": {},
    "mean": {"pooling": "mean"},
    "answers": {"task": "question-answering"},
    "chat": {"task": "instruction-tuning"},
}


# Of the other families, what is refused and one task are enough.
WHOLE = ("Bert", "Gemma2", "Llama", "T5")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return families.tokenizer(tmp_path_factory.mktemp("words"))


def planned(model: Path, **changes: Any) -> RunConfig:
    usual = {"num_classes": 2, "max_length": 16, "num_clients": 2}
    return text_config(model, model, **{**usual, **changes})


@pytest.mark.parametrize("family", families.SETTINGS)
def test_a_family_trains_or_is_refused_in_a_sentence_when_it_is_planned(
    family: str, words: Any, tmp_path: Path
) -> None:
    model = families.save(family, tmp_path / family, words)
    for task, changes in TASKS.items():
        config = planned(model, **changes)
        if (family, task) in REFUSED:
            with pytest.raises(InvalidValue, match=REFUSED[family, task]):
                forecast(config, records=900)
        elif task == "model" or family in WHOLE:
            assert not forecast(config, records=900).broken, (family, task)


# The layers that get an adapter when nothing is said, or the words of the refusal.
PICTURES = {
    "test_vit": (r"attn\.(qkv|proj)", 12),
    "test_convnext": (r"(mlp|mlp_channels)\.fc[12]", 18),
    "test_efficientnet": ("no linear layers", 0),
    "test_resnet": ("no linear layers", 0),
    "test_mambaout": ("linear layers are", 0),
}


@pytest.mark.parametrize("model", PICTURES)
def test_a_family_of_image_models_trains_or_is_refused_in_a_sentence(
    model: str, tmp_path: Path
) -> None:
    config = image_config(tmp_path, model=model, image_size=0, num_classes=3)
    said, layers = PICTURES[model]
    if layers:
        assert forecast(config, records=900).layers == layers
        assert build_task(config.task, config).lora_targets.endswith(said)
    else:
        with pytest.raises(InvalidValue, match=said):
            forecast(config, records=900)


@pytest.mark.parametrize(
    "model", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "swinv2_tiny_window8_256"]
)
def test_attention_that_never_calls_its_layer_gets_no_adapter_on_it(
    model: str, tmp_path: Path
) -> None:
    config = image_config(tmp_path, model=model, image_size=0, num_classes=3)
    assert build_task(config.task, config).lora_targets.endswith(r"attn\.proj")


def test_a_layer_that_reads_positions_is_refused_when_it_is_planned(
    words: Any, tmp_path: Path
) -> None:
    model = families.save("DebertaV2", tmp_path / "model", words)
    config = planned(model, lora_targets=r".*\.query_proj")
    with pytest.raises(PrivacyViolation, match="with lora-targets, or another model"):
        forecast(config, records=900)


def test_a_large_model_is_known_by_its_shapes(
    words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = families.save("T5", tmp_path / "model", words)
    monkeypatch.setattr(rehearsal, "_LARGEST", 1)
    with pytest.raises(InvalidValue, match="pooling = 'mean'"):
        forecast(planned(model, pooling="mean"), records=900)


@pytest.mark.parametrize("strategy", ["flora", "fedex-lora"])
def test_a_tied_layer_is_refused_before_a_method_folds_into_it(
    strategy: str, words: Any, tmp_path: Path
) -> None:
    model = families.save("Llama", tmp_path / "model", words, tie_word_embeddings=True)
    changes = {"task": "instruction-tuning", "lora_targets": r".*\.q_proj|lm_head"}
    told = r"weight of lm_head = .*embed_tokens.*Leave the layer out of lora-targets"
    with pytest.raises(InvalidValue, match=told):
        forecast(planned(model, strategy=strategy, **changes), records=900)
    assert forecast(planned(model, strategy="ffa-lora", **changes), records=900).layers == 3


def test_a_tokenizer_of_another_model_is_refused_when_it_is_planned(
    words: Any, tmp_path: Path
) -> None:
    model = families.save("Bert", tmp_path / "model", words, vocab_size=20)
    with pytest.raises(InvalidValue, match=r"tokens 0 to 19 only\. Save the model after"):
        forecast(planned(model), records=900)


@pytest.mark.parametrize(
    "task", ["text-classification", "question-answering", "instruction-tuning"]
)
def test_a_token_beyond_the_embedding_is_refused_before_a_round(
    task: str, words: Any, tmp_path: Path
) -> None:
    from tests.tasks.questions import row

    model = families.save("Llama", tmp_path / "model", words)
    more = transformers.AutoTokenizer.from_pretrained(model)
    more.add_tokens(["hitherto"])
    more.save_pretrained(model)
    rows: dict[str, list[Any]] = {
        "text-classification": [{"text": "bali hitherto balu", "label": i % 2} for i in range(8)],
        "question-answering": [row("bali hitherto balu", ("balu", 14))] * 8,
        "instruction-tuning": [{"prompt": "bali", "response": "hitherto balu"}] * 8,
    }
    for split in ("train", "validation"):
        checkpoints.write_split(tmp_path / "set", split, rows[task])
    config = text_config(model, tmp_path / "set", task=task, weights="random", num_clients=2)

    for prepare in (forecast, prepare_run):
        with pytest.raises(InvalidValue, match=f"records have token {len(words)}, but the model"):
            prepare(config)


class Failing(DigitsTask):
    """A task of the user's own with a mistake."""

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.measured = settings.eval_every == 2

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return super().losses(model, batch if self.measured else {"image": batch["image"]})

    def evaluate(self, model: nn.Module, records: Any) -> dict[str, float]:
        raise ZeroDivisionError("a mean of nothing")


def test_a_mistake_in_a_users_own_task_is_one_sentence_that_says_where(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(task="tests.server.test_rehearsal:Failing")
    line = Failing.losses.__code__.co_firstlineno + 1
    for prepare in (forecast, prepare_run):
        with pytest.raises(ModelFailed, match="KeyError: 'label'") as told:
            prepare(config)
        assert f"in {__file__}, line {line}" in str(told.value)
        assert "\n" not in str(told.value)

    plan = prepare_run(make_config(task=config.task, eval_every=2))
    with pytest.raises(ModelFailed, match=r"public records failed \(ZeroDivisionError: a mean"):
        run_in_process(plan, RunDirectory(tmp_path / "run"), lambda row: None)
    assert not RunDirectory(tmp_path / "run").rows("rounds")


def test_commands_end_with_one_sentence(words: Any, tmp_path: Path) -> None:
    model = families.save("T5", tmp_path / "model", words)
    settings = {
        "task": "text-classification", "model": model, "weights": "random", "pooling": "mean",
        "dataset": write_reviews(tmp_path / "set"), "partitioner": "iid", "min-records": 1,
        "num-clients": 2, "device": "cpu", "max-length": 16,
    }  # fmt: skip
    overrides = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
    for command in ("plan", "simulate", "run"):
        extra = [] if command == "plan" else ["--output", str(tmp_path / "runs")]
        found = CliRunner().invoke(app, [command, "digits", *overrides, *extra])
        assert found.exit_code == 1
        assert found.output.startswith("Error: pooling = 'mean' cannot be used"), found.output
        assert len(found.output.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rehearsal_leaves_the_model_as_it_was(precision: str, make_config: MakeConfig) -> None:
    config = make_config(precision=precision)
    task = build_task(config.task, config)
    adapted, untouched = build_adapted(config, task), build_adapted(config, task)
    random = torch.get_rng_state()
    rehearse(config, task, adapted)

    assert torch.equal(random, torch.get_rng_state())
    for (name, mine), (_, others) in zip(
        adapted.model.state_dict().items(), untouched.model.state_dict().items(), strict=True
    ):
        assert torch.equal(mine, others), name
    for mine, others in zip(adapted.model.modules(), untouched.model.modules(), strict=True):
        assert mine.training == others.training
        assert ("forward" in vars(mine)) == ("forward" in vars(others))
    asked = [(p.requires_grad, p.grad) for p in adapted.model.parameters()]
    assert asked == [(p.requires_grad, p.grad) for p in untouched.model.parameters()]
    assert adapted.fingerprint == untouched.fingerprint
    batch = task.test_records().batch(torch.arange(8))
    assert torch.equal(task.losses(adapted.model, batch), task.losses(untouched.model, batch))


def test_a_model_with_numbers_among_its_buffers_trains_private_rounds(
    words: Any, tmp_path: Path
) -> None:
    model = families.save("Gemma2", tmp_path / "model", words)
    config = text_config(
        model,
        write_reviews(tmp_path / "set"),
        weights="random",
        strategy="flora",
        num_clients=2,
        num_rounds=2,
        local_steps=1,
        batch_size=4,
    )
    assert any(
        not buffer.shape for buffer in build_task(config.task, config).build_model().buffers()
    )
    found = run_in_process(prepare_run(config), RunDirectory(tmp_path / "run"), lambda row: None)
    assert (found["status"], found["failures"]) == ("completed", 0)


def test_only_a_head_that_trains_is_announced(words: Any, tmp_path: Path) -> None:
    model = families.save("Llama", tmp_path / "model", words)
    rows = [{"prompt": "bali", "response": "balu"}] * 8
    for split in ("train", "validation"):
        checkpoints.write_split(tmp_path / "set", split, rows)
    changes: dict[str, Any] = {"weights": "random", "num_clients": 2, "epsilon": float("inf")}
    chats = text_config(model, tmp_path / "set", task="instruction-tuning", **changes)
    texts = text_config(model, write_reviews(tmp_path / "reviews"), max_length=32, **changes)
    frozen = text_config(model, tmp_path / "reviews", max_length=32, train_head=False, **changes)
    assert [
        "head" in describe_plan(prepare_run(config))[0][1] for config in (chats, texts, frozen)
    ] == [
        False,
        True,
        False,
    ]


def test_the_head_of_a_model_without_a_backbone_in_one_place_is_its_last_layer(
    words: Any, tmp_path: Path
) -> None:
    model = families.save("T5", tmp_path / "model", words)
    config = planned(model, task="question-answering")
    assert build_task(config.task, config).head == ("qa_outputs",)


def test_a_model_without_a_limit_reads_texts_of_any_length(words: Any, tmp_path: Path) -> None:
    model = families.save("XLNet", tmp_path / "model", words)
    config = planned(model, max_length=4000)
    assert build_task(config.task, config).head == ("sequence_summary", "logits_proj")
