from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fedlora_flwr import PrivateTrainer
from fedlora_flwr.errors import BudgetExhausted, InvalidValue, PrivacyViolation
from fedlora_flwr.privacy.engine import PrivateEngine
from tests.support.forks import forked, trains_in_forks

COUNT = 24
Record = dict[str, Any]


def build_model(causal: bool = False) -> Any:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 40,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 20,
        "pad_token_id": 1,
    }
    if causal:
        model: Any = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=1))
        return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = RobertaForSequenceClassification(RobertaConfig(**shape, **off, num_labels=3))
    lora = LoraConfig(
        r=2, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS"
    )
    return get_peft_model(model, lora)


def records(count: int = COUNT, causal: bool = False) -> list[Record]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for i in range(count):
        length = 7 if causal else 4 + i % 4
        tokens = torch.randint(2, 40, (length,), generator=generator).tolist()
        labels = tokens if causal else i % 3
        found.append({"input_ids": tokens, "attention_mask": [1] * length, "labels": labels})
    return found


def collate(chosen: list[Record]) -> dict[str, Tensor]:
    longest = max(len(record["input_ids"]) for record in chosen)

    def padded(key: str, padding: int) -> Tensor:
        rows = [record[key] + [padding] * (longest - len(record[key])) for record in chosen]
        return torch.tensor(rows)

    labels = torch.tensor([record["labels"] for record in chosen])
    masks = {"attention_mask": padded("attention_mask", 0)}
    return {"input_ids": padded("input_ids", 1), **masks, "labels": labels}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": COUNT,
        "max_steps": 4,
        "learning_rate": 0.5,
        "optim": "sgd",
        "max_grad_norm": 1.0,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **{**settings, **changes})


def private(
    folder: Path, model: Any = None, data: Any = None, budget: float = math.inf, **changes: Any
) -> PrivateTrainer:
    own = {
        key: changes.pop(key)
        for key in tuple(changes)
        if key in ("losses", "microbatch_size", "callbacks", "eval_dataset", "eval_is_public")
        or key in ("compute_loss_func", "optimizers", "model_init", "ledger")
    }
    return PrivateTrainer(
        model or build_model(),
        arguments(folder, **changes),
        data_collator=collate,
        train_dataset=records() if data is None else data,
        epsilon=budget,
        delta=1e-3,
        **own,
    )


def trained(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def moved(before: dict[str, Tensor], model: Any) -> Tensor:
    after = dict(model.named_parameters())
    return torch.cat([(after[name] - value).detach().flatten() for name, value in before.items()])


@pytest.mark.parametrize(
    ("causal", "changes"),
    [
        (False, {}),
        (False, {"optim": "adamw_torch", "learning_rate": 0.01}),
        (False, {"optim": "adamw_torch_fused", "learning_rate": 0.01}),
        (False, {"label_smoothing_factor": 0.2}),
        (False, {"lr_scheduler_type": "cosine", "warmup_steps": 2}),
        (False, {"microbatch_size": 5}),
        (True, {}),
        (True, {"optim": "adamw_torch", "learning_rate": 0.01, "weight_decay": 1.0}),
    ],
)
def test_without_noise_clipping_and_sampling_it_is_the_trainer(
    tmp_path: Path, causal: bool, changes: dict[str, Any]
) -> None:
    """Batches of all records, so that nothing is drawn; optimizer, schedule and loss are theirs."""
    data = records(causal=causal)
    ours, theirs = build_model(causal), build_model(causal)
    private(tmp_path / "ours", ours, data, max_grad_norm=1e9, **changes).train()
    plain = {key: value for key, value in changes.items() if key != "microbatch_size"}
    settings = arguments(tmp_path / "theirs", max_grad_norm=1e9, **plain)
    Trainer(theirs, settings, data_collator=collate, train_dataset=data).train()
    start = trained(build_model(causal))
    assert moved(start, theirs).norm() > 1e-3
    torch.testing.assert_close(moved(start, ours), moved(start, theirs), rtol=2e-3, atol=2e-5)


def test_max_grad_norm_bounds_each_record_over_all_tensors(tmp_path: Path) -> None:
    model = build_model()
    start = trained(model)
    data = COUNT * records(1)
    private(tmp_path, model, data, max_steps=1, learning_rate=1.0, max_grad_norm=1e-3).train()
    # One step of rate 1 moves by the mean of clipped gradients, here all the same, of norm C.
    assert moved(start, model).norm() == pytest.approx(1e-3, rel=1e-3)


def test_the_noise_is_that_of_the_calibrated_mechanism(tmp_path: Path) -> None:
    model = build_model()
    start = trained(model)
    trainer = private(tmp_path, model, budget=1.0, max_steps=1, learning_rate=1.0)
    trainer.train()
    mechanism = trainer.mechanism
    assert mechanism is not None
    assert (mechanism.clip_norm, mechanism.batch_size, mechanism.num_records) == (1.0, COUNT, COUNT)
    noise = moved(start, model)
    expected = mechanism.noise_multiplier / COUNT * math.sqrt(len(noise))
    assert noise.norm() == pytest.approx(expected, rel=0.3)


def test_two_runs_with_the_same_seed_have_noise_of_their_own(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        model = build_model()
        start = trained(model)
        private(tmp_path / name, model, budget=1.0, max_steps=1, seed=7).train()
        found.append(moved(start, model))
    assert not torch.allclose(found[0], found[1])


class Watch(TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.steps = 0

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.logs.append(dict(logs))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps += 1


def test_all_planned_steps_fit_the_budget_and_are_reported(tmp_path: Path) -> None:
    watch = Watch()
    sizes: list[int] = []
    step = PrivateEngine.step

    def counting(self: PrivateEngine, chosen: Any, indices: Tensor, active: Any) -> None:
        sizes.append(len(indices))
        step(self, chosen, indices, active)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrivateEngine, "step", counting)
        trainer = private(
            tmp_path,
            budget=8.0,
            callbacks=[watch],
            max_steps=-1,
            num_train_epochs=3,
            per_device_train_batch_size=4,
            logging_steps=1,
            save_strategy="epoch",
        )
        output = trainer.train()
    assert (watch.steps, output.global_step, len(sizes)) == (18, 18, 18)
    assert len(set(sizes)) > 1  # Poisson samples differ in size.
    assert output.metrics["epsilon"] == pytest.approx(8.0, rel=0.01)
    assert output.metrics["epsilon"] <= 8.0
    assert trainer.privacy is not None
    assert trainer.privacy.steps == 18
    assert (tmp_path / "ledger.sqlite").exists()
    assert math.isnan(output.training_loss)
    state = json.loads((tmp_path / "checkpoint-18" / "trainer_state.json").read_text())
    for row in (*watch.logs, *state["log_history"], output.metrics):
        assert not {"loss", "train_loss", "grad_norm"} & set(row)
    assert any("learning_rate" in row for row in watch.logs)


def test_a_second_training_is_past_the_budget(tmp_path: Path) -> None:
    trainer = private(tmp_path, budget=8.0)
    trainer.train()
    after = trained(trainer.model)
    with pytest.raises(BudgetExhausted, match="4 more steps after 4"):
        trainer.train()
    assert moved(after, trainer.model).norm() == 0


def test_a_trainer_that_steps_on_is_stopped(tmp_path: Path) -> None:
    class GoOn(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            state.max_steps = 100
            control.should_training_stop = False
            return control

    with pytest.raises(PrivacyViolation, match="more steps than the noise is made for"):
        private(tmp_path, callbacks=[GoOn()], per_device_train_batch_size=4, max_steps=2).train()


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("gradient_accumulation_steps", 4, "expected 1: a private step takes one whole batch"),
        ("max_grad_norm", 0.0, "it is C, the largest norm of one record's gradient"),
        ("train_sampling_strategy", "group_by_length", "batches are Poisson samples"),
        ("auto_find_batch_size", True, "a restart repeats steps; use microbatch_size"),
        ("neftune_noise_alpha", 5.0, "so it mixes records"),
        ("torch_compile", True, "per-record gradients need the plain layers"),
        ("use_liger_kernel", True, "it hides the loss of each record"),
        ("include_num_input_tokens_seen", "all", "the number of tokens in a batch is private"),
        ("optim", "lomo", "one that reads gradients only"),
        ("bf16", True, "run_in_bf16"),
    ],
)
def test_a_setting_that_would_break_the_guarantee_is_refused_by_name(
    tmp_path: Path, key: str, value: Any, sentence: str
) -> None:
    with pytest.raises(InvalidValue, match=f"^{key} = .*{sentence}"):
        private(tmp_path, **{key: value})


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("fp16", True, "whether its loss scaler skips a step is private"),
        ("deepspeed", "plan.json", "one process on one device"),
        ("fsdp", True, "one process on one device"),
        ("n_gpu", 2, "one process on one device"),
        ("world_size", 2, "one process on one device"),
    ],
)
def test_settings_of_gpus_are_refused_by_name(
    tmp_path: Path, key: str, value: Any, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the arguments say on machines that have them."""
    args = arguments(tmp_path)
    if isinstance(getattr(TrainingArguments, key, None), property):
        monkeypatch.setattr(TrainingArguments, key, property(lambda _: value))
    else:
        vars(args)[key] = value
    with pytest.raises(InvalidValue, match=f"^{key} = .*{sentence}"):
        PrivateTrainer(build_model(), args, train_dataset=records(), epsilon=1.0, delta=1e-3)


def mean_loss(*_: Any) -> Tensor:
    return torch.zeros(())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"compute_loss_func": mean_loss},
            "compute_loss_func = .* pass losses, one loss per record",
        ),
        ({"model_init": build_model}, "model_init = .* pass the PeftModel itself"),
        ({"data": iter(())}, "train_dataset = .* a data set with a length and positions"),
        ({"eval_dataset": records(3)}, "eval_dataset = 'list'.* eval_is_public = True to say so"),
        ({"model": nn.Linear(2, 2)}, r"model = 'Linear' .* a peft.PeftModel: get_peft_model"),
    ],
)
def test_what_would_pass_the_private_step_by_is_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InvalidValue, match=sentence):
        private(tmp_path, **changes)


def test_an_optimizer_of_ones_own_is_refused(tmp_path: Path) -> None:
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidValue, match=r"optimizers = \['SGD'\] .* optimizer_cls_and_kwargs"):
        private(tmp_path, model, optimizers=(optimizer, None))


def test_a_loss_of_ones_own_is_refused(tmp_path: Path) -> None:
    class Own(PrivateTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(InvalidValue, match=r"compute_loss = 'Own'.*pass losses"):
        Own(build_model(), arguments(tmp_path), train_dataset=records(), epsilon=1.0, delta=1e-3)


@trains_in_forks
def test_a_trainer_that_was_forked_draws_noise_of_its_own(tmp_path: Path) -> None:
    trainer = private(tmp_path, budget=8.0, max_steps=1)

    def after() -> bytes:
        trainer._ledger_path = tmp_path / str(os.getpid())
        trainer.train()
        return b"".join(value.numpy().tobytes() for value in trained(trainer.model).values())

    assert len({forked(after), forked(after), after()}) == 3


def test_resuming_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match=r"resume_from_checkpoint = True .* taken twice"):
        private(tmp_path).train(resume_from_checkpoint=True)


def test_evaluation_is_on_public_records_only(tmp_path: Path) -> None:
    data = records()
    trainer = private(
        tmp_path, data=data, eval_dataset=records(5), eval_is_public=True, label_names=["labels"]
    )
    assert trainer.evaluate()["eval_loss"] > 0
    for leak in (trainer.evaluate, trainer.predict):
        with pytest.raises(InvalidValue, match="figures on private records are not protected"):
            leak(data)


def test_losses_of_ones_own_are_clipped_record_by_record(tmp_path: Path) -> None:
    seen: list[int] = []

    def losses(model: nn.Module, batch: Any) -> Tensor:
        seen.append(len(batch["labels"]))
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs).logits
        return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none") * 1e6

    model = build_model()
    start = trained(model)
    private(tmp_path, model, max_steps=1, learning_rate=1.0, losses=losses).train()
    assert seen
    assert moved(start, model).norm() <= 1.0 + 1e-5


def test_a_mean_over_the_batch_is_no_loss_of_a_record(tmp_path: Path) -> None:
    def losses(model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    with pytest.raises(PrivacyViolation, match="one loss per record is needed"):
        private(tmp_path, losses=losses).train()


def test_a_task_without_classes_needs_losses(tmp_path: Path) -> None:
    data = [{**record, "labels": float(record["labels"])} for record in records()]
    with pytest.raises(InvalidValue, match="for any other task pass losses"):
        private(tmp_path, data=data).train()


def test_a_stream_cannot_be_sampled(tmp_path: Path) -> None:
    class Stream(IterableDataset[Record]):
        def __iter__(self) -> Any:
            return iter(records())

    with pytest.raises(InvalidValue, match="train_dataset = 'Stream'"):
        private(tmp_path, data=Stream())
