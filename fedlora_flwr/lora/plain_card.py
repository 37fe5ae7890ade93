"""The model card of an adapter where nothing is known but the model: no run, no strategy, no ε."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlora_flwr.lora.adapters import AdaptedModel

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_NO_PROMISE = (
    "Nothing in this folder says how the adapter was trained. If it was trained privately, write "
    "here the ε and the δ, what one record is, who adds the noise, and which runs are covered. "
    "`fedlora ledger PLACE` shows what a ledger has counted. Without these, no privacy is promised."
)


def plain_card(adapted: AdaptedModel, base: str, promise: str = "") -> str:
    """Return a card with what the model itself tells.

    Parameters
    ----------
    adapted : AdaptedModel
        The model with its adapters.
    base : str
        Public name of the base model; empty if it has none.
    promise : str (default: "")
        What is said of privacy, in Markdown. By default it is that nothing is promised.

    Returns
    -------
    str
        Markdown, with the metadata that the Hugging Face hub reads.
    """
    kind = type(adapted.model.get_base_model()).__name__
    first = adapted.layers[0]
    metadata = ["library_name: peft", "tags:", "- lora", "- fedlora-flwr"]
    if _HUB_NAME.fullmatch(base):
        metadata.insert(0, f"base_model: {base}")
    heads = ", ".join(f"`{linear.name}`" for linear in adapted.head)
    rows = {
        "base model": f"`{base}`, a {kind}" if base else f"a {kind}, which you build",
        "adapters": f"{len(adapted.layers)} linear layers, such as `{first.name}`",
        "rank": str(adapted.rank),
        "scaling": f"{first.scaling:g}",
        "trained in full": heads or "nothing",
    }
    parts = [
        "---", *metadata, "---", "", "# LoRA adapter", "",
        "PEFT loads it onto the base model with `PeftModel.from_pretrained(base, folder)`.", "",
        "| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items()), "",
        "## Privacy", "", promise or _NO_PROMISE, "",
    ]  # fmt: skip
    return "\n".join(parts)
