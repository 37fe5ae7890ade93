"""``[task]``: the task to learn, and its backbone."""

from __future__ import annotations

from dataclasses import dataclass

from fedlora_flwr.config.keys import ANY, FLAG, Decider, between, choice, key

_DEVICE, _LIMITED, _RUN, _PACKAGE = Decider.DEVICE, Decider.LIMITED, Decider.RUN, Decider.PACKAGE


@dataclass(frozen=True)
class TaskSection:
    """The task to learn, and its backbone."""

    task: str = key(
        "digits", ANY, "the task's name, or your own task as module:function",
        _DEVICE, "It chooses the code that reads the records.",
    )  # fmt: skip
    model: str = key(
        "", ANY, "transformers or timm model: a name, or a folder",
        _DEVICE, "A model can mix records, and its files can hold code and templates.",
    )  # fmt: skip
    weights: str = key(
        "pretrained", ANY, "pretrained, random, or a file for a timm model",
        _DEVICE, "It can name a file of the device.",
    )  # fmt: skip
    quantization: str = key(
        "none", choice("none", "8bit", "4bit"),
        "quantization of a transformers backbone, on CUDA GPUs",
        _DEVICE, "It depends on the device's hardware.",
    )  # fmt: skip
    pooling: str = key(
        "model", choice("model", "mean"),
        "texts: classify by the state that the model pools itself, or by the mean of all states",
        _RUN, "Both ways treat each record on its own.",
    )  # fmt: skip
    max_length: int = key(
        128, between(8, 1_000_000), "most tokens that are read of a record",
        _LIMITED, "Devices must agree on it; it costs memory and time.",
    )  # fmt: skip
    max_new_tokens: int = key(
        128, between(1, 1_000_000), "most tokens of an answer that a language model writes",
        _PACKAGE, "A device writes no answers.",
    )  # fmt: skip
    image_size: int = key(
        0, between(0, 4_096), "height and width of pictures; 0 = the model's own",
        _LIMITED, "Devices must agree on it; it costs memory and time.",
    )  # fmt: skip
    split_qkv: bool = key(
        False, FLAG, "timm: adapt q, k and v of a fused layer separately, e.g. as …attn.qkv.q",
        _RUN, "Everything that trains is clipped together, however a layer is cut.",
    )  # fmt: skip
