"""Which arguments of a Trainer `PrivateTrainer` accepts, and which it refuses by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from transformers import Trainer

from fedlora_flwr.errors import InvalidValue

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor")
_ONE = "one process on one device: each of several would draw, clip and noise on its own"
_BF16 = "False; for speed call fedlora_flwr.lora.precision.run_in_bf16(model), which clips in fp32"

# A setting of TrainingArguments, a test of its value, and what an error message says is allowed.
_ARGUMENTS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "gradient_accumulation_steps",
        lambda value: value == 1,
        "1: a private step takes one whole batch; per_device_train_batch_size is its expected "
        "size, and microbatch_size what fits into one pass",
    ),
    (
        "max_grad_norm",
        lambda value: 0 < (value or 0) < math.inf,
        "a number above 0: it is C, the largest norm of one record's gradient",
    ),
    ("world_size", lambda value: value == 1, _ONE),
    ("n_gpu", lambda value: value <= 1, _ONE),
    ("deepspeed", lambda value: not value, _ONE),
    ("fsdp", lambda value: not value, _ONE),
    ("fp16", lambda value: not value, "False: whether its loss scaler skips a step is private"),
    ("bf16", lambda value: not value, _BF16),
    (
        "train_sampling_strategy",
        lambda value: value in (None, "random"),
        "'random': batches are Poisson samples, and no other order has their guarantee",
    ),
    ("group_by_length", lambda value: not value, "False: batches are Poisson samples"),
    (
        "auto_find_batch_size",
        lambda value: not value,
        "False: the batch size sets the noise, and a restart repeats steps; use microbatch_size",
    ),
    (
        "neftune_noise_alpha",
        lambda value: value is None,
        "None: its noise depends on the longest record of a batch, so it mixes records",
    ),
    ("torch_compile", lambda value: not value, "False: per-record gradients need the plain layers"),
    ("use_liger_kernel", lambda value: not value, "False: it hides the loss of each record"),
    (
        "include_num_input_tokens_seen",
        lambda value: value in (False, "no"),
        "'no': the number of tokens in a batch is private",
    ),
    ("optim", lambda value: value in OPTIMIZERS, f"one that reads gradients only: {OPTIMIZERS}"),
)


def check_trainer(kind: type, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that would train without the private step, before anything is built."""
    if kind.compute_loss is not Trainer.compute_loss:  # type: ignore[attr-defined]
        allowed = "transformers' own: it gives one loss per batch; pass losses, one loss per record"
        raise InvalidValue("compute_loss", kind.__name__, allowed)
    expected = {
        "model_init": "None: pass the PeftModel itself",
        "compute_loss_func": "None: it gives one loss per batch; pass losses, one loss per record",
    }
    for name, allowed in expected.items():
        if arguments.get(name) is not None:
            raise InvalidValue(name, arguments[name], allowed)
    given = [type(made).__name__ for made in arguments.get("optimizers") or () if made is not None]
    if given:
        allowed = "none: name one by optim and lr_scheduler_type, or pass optimizer_cls_and_kwargs"
        raise InvalidValue("optimizers", given, allowed)


def check_arguments(args: Any) -> None:
    """Refuse a setting of TrainingArguments that would break the guarantee."""
    for name, is_fine, expected in _ARGUMENTS:
        value = getattr(args, name, None)
        value = getattr(value, "value", value)
        if hasattr(args, name) and not is_fine(value):
            raise InvalidValue(name, value, expected)
