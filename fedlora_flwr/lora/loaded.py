"""An adapter's folder on a base model: loaded by PEFT, and merged into the weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from fedlora_flwr.errors import InvalidValue, one_line
from fedlora_flwr.lora.digests import digest, joined
from fedlora_flwr.lora.exported import BACKBONE, is_saved


def load_adapter(base: nn.Module, folder: Path, *, compare: bool = True) -> Any:
    """Load an adapter onto a base model.

    Parameters
    ----------
    base : nn.Module
        The model without adapters; it is changed in place.
    folder : Path
        The adapter's folder.
    compare : bool (default: True)
        Whether the frozen weights must be those that the folder names. A run that splits fused
        layers or rounds weights names others.

    Returns
    -------
    PeftModel
        The model in evaluation mode.

    Raises
    ------
    InvalidValue
        PEFT cannot read the folder, or the adapter is for another model.
    """
    known = folder / BACKBONE
    if compare and known.exists() and known.read_text("ascii").strip() != _backbone(base, folder):
        allowed = (
            "an adapter of this model, but it was trained on other frozen weights. Set model to "
            "the model of the run"
        )
        raise InvalidValue("adapter", str(folder), allowed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(base, str(folder)).eval()
    except Exception as error:  # PEFT and safetensors raise errors of many types.
        allowed = f"a folder with an adapter for this model ({one_line(error)})"
        raise InvalidValue("adapter", str(folder), allowed) from error


def _backbone(base: nn.Module, folder: Path) -> str:
    """Return the hash of a model's weights that come from a checkpoint, as an export has it."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    saved = config.get("modules_to_save") or ()
    named = (*base.named_parameters(), *base.named_buffers())
    return joined(digest(n, t) for n, t in named if not is_saved(n.rpartition(".")[0], saved))


def merged(model: Any) -> nn.Module:
    """Add an adapter's products to the frozen weights, and return the plain model.

    Parameters
    ----------
    model : PeftModel
        The model of `load_adapter`; it is used up.
    """
    plain: nn.Module = model.merge_and_unload()
    return plain.eval()
