"""``[as-lora]``: how AS-LoRA chooses which factor of a block trains.

A device checks every key that a run sends, but must not load a strategy, which is the server's
code. Therefore this section is here and not with the strategy; `ASLoRA.settings` is this class. A
new method declares its settings in its own file instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedlora_flwr.config.keys import Decider, between, choice, key

_RUN = Decider.RUN
_SERVER = "Only the server reads it."


@dataclass(frozen=True)
class ASLoRASection:
    """How AS-LoRA chooses which factor of a block trains."""

    curvature: str = key(
        "none", choice("none", "secant"), "subtract the cost of curvature and noise from scores",
        _RUN, _SERVER,
    )  # fmt: skip
    curvature_rounds: int = key(
        0, between(0, 1_000_000), "number of last rounds that use curvature; 0 = all",
        _RUN, _SERVER,
    )  # fmt: skip
    selection: str = key(
        "sample", choice("sample", "argmax", "fixed"),
        "sample: draw by score; argmax: take the better factor; fixed: alternate",
        _RUN, _SERVER,
    )  # fmt: skip
    groups: str = key(
        "block", choice("block", "tied", "layer"),
        "parts of the model that choose separately; tied = all make the same choice",
        _RUN, "A device obeys any plan under the same private step.",
    )  # fmt: skip
    temperature: float = key(
        1.0, between(1e-6, 1e6), "divisor of the difference of two scores before a draw",
        _RUN, _SERVER,
    )  # fmt: skip
    explore: float = key(0.02, between(0, 0.5), "least probability of either factor", _RUN, _SERVER)
    score_decay: float = key(
        0.9, between(0, 0.9999), "weight of the past in scores; 0 = the last round only",
        _RUN, _SERVER,
    )  # fmt: skip
    score_drift: float = key(
        0.2, between(0, 1e6), "share by which a score may change per round without being measured",
        _RUN, _SERVER,
    )  # fmt: skip
    warm_up: float = key(
        0.1, between(0, 1), "share of the rounds in which all blocks alternate",
        _RUN, _SERVER,
    )  # fmt: skip
