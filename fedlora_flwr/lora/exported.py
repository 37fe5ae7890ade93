"""The adapter folder that plain PEFT loads: adapters, head, and other modules drawn at random."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from fedlora_flwr.lora.fused_layers import fused_factors, fused_name
from fedlora_flwr.lora.plain_card import plain_card

if TYPE_CHECKING:
    from fedlora_flwr.lora.adapters import AdaptedLinear, AdaptedModel

DRAWN = "drawn_modules"
"""Attribute of a model: names of its modules, including the head, that are in no checkpoint."""
BACKBONE = "backbone.txt"
"""File with the hash of the backbone to which the adapter belongs."""
PREFIX = "base_model.model."
_ADAPTER = re.compile(r"\.lora_\w+\.")


def write_adapter(adapted: AdaptedModel, folder: Path, promise: str = "") -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` loads onto the checkpoint.

    Modules that a run draws at random, such as a new head, get other values each time the
    checkpoint is loaded. The folder therefore holds their weights (PEFT's ``modules_to_save``),
    whether they train or not. PEFT gives such modules no adapter, so an adapter on one of them is
    merged into the weight that is written.

    Pairs that are folded into frozen weights become further ranks of their layer's adapter, with a
    ``rank_pattern`` and an ``alpha_pattern`` that keep its scaling. In the same way the adapters of
    the parts of a fused layer (`fedlora_flwr.lora.fused_layers`) become one adapter of this layer.

    Parameters
    ----------
    adapted : AdaptedModel
        The model; it does not change.
    folder : Path
        The folder; it is made if missing.
    promise : str (default: "")
        What the card says of privacy, in Markdown; see `plain_card`.
    """
    model, adapter, saved = adapted.model, adapted.adapter, adapted.saved
    config = model.peft_config[adapter]
    written = copy.copy(config)
    written.rank_pattern, written.alpha_pattern = {}, {}
    written.modules_to_save, written.inference_mode = list(saved) or None, True
    written.base_model_name_or_path = public_name(str(config.base_model_name_or_path or ""))
    state = _saved_state(adapted)
    for layer in adapted.layers:
        if is_saved(layer.name, saved):
            delta = layer.module.get_delta_weight(adapter)
            state[f"{PREFIX}{layer.name}.weight"] = layer.base.weight + delta
    found = list(_adapters(adapted))
    names = {name for name, *_ in found}
    if names - {layer.name for layer in adapted.layers}:  # The pattern doesn't match fused layers.
        written.target_modules = "|".join(map(re.escape, sorted(names)))
    for name, b, a, scaling in found:
        state[f"{PREFIX}{name}.lora_A.weight"] = a
        state[f"{PREFIX}{name}.lora_B.weight"] = b
        rank, usual = a.shape[0], config.lora_alpha / _spread(config.r, config.use_rslora)
        if rank != config.r or not math.isclose(scaling, usual):
            pattern = "^" + re.escape(name)
            written.rank_pattern[pattern] = rank
            written.alpha_pattern[pattern] = scaling * _spread(rank, config.use_rslora)
    folder.mkdir(parents=True, exist_ok=True)
    card = plain_card(adapted, written.base_model_name_or_path, promise)
    (folder / "README.md").write_text(card, encoding="utf-8")
    # safetensors refuses tensors that share memory.
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    save_file(own, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    # The hash is not in the metadata: with a second key there, safetensors would write the keys in
    # an order that changes, and the file's bytes with it.
    (folder / BACKBONE).write_text(f"{adapted.backbone}\n", encoding="ascii")
    base = type(model.get_base_model())
    written.save_pretrained(
        str(folder),
        auto_mapping_dict={"base_model_class": base.__name__, "parent_library": base.__module__},
    )


def public_name(model: str) -> str:
    """Return a model's name without the folders of this machine, which others need not know."""
    path = Path(model).expanduser()
    return path.name if path.is_absolute() or path.exists() else model


def plain_name(name: str) -> str:
    """Remove what PEFT adds to the name of a module or parameter."""
    name = name.removeprefix(PREFIX)
    return re.sub(r"\.(modules_to_save\.\w+|base_layer|original_module)(?=\.|$)", "", name)


def outermost(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names without duplicates and without modules that are inside another one."""
    given = tuple(dict.fromkeys(names))
    return tuple(name for name in given if not any(name.startswith(f"{other}.") for other in given))


def is_saved(module: str, saved: Iterable[str]) -> bool:
    """Tell whether PEFT saves a module in full, given the names ``saved``.

    PEFT saves every module whose name ends with one of ``saved``, and all modules inside it.
    """
    paths = accumulate(module.split("."), lambda path, part: f"{path}.{part}")
    return any(path.endswith(name) for path in paths for name in saved)


def _saved_state(adapted: AdaptedModel) -> dict[str, Tensor]:
    state = {}
    for key, tensor in adapted.model.state_dict().items():
        name = plain_name(key)
        if ".original_module." in key or _ADAPTER.search(key):
            continue
        if is_saved(name.rpartition(".")[0], adapted.saved):
            state[f"{PREFIX}{name}"] = tensor
    return state


def _adapters(adapted: AdaptedModel) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Yield the adapters of the original backbone's layers: name, B, A and scaling."""
    model = adapted.model.get_base_model()
    parts: dict[str, dict[str, AdaptedLinear]] = {}
    for layer in adapted.layers:
        if fused := fused_name(model, layer.name):
            parts.setdefault(fused, {})[layer.name.rpartition(".")[2]] = layer
        elif not is_saved(layer.name, adapted.saved):
            yield (layer.name, *_factors(adapted, layer), layer.scaling)
    for fused, layers in parts.items():
        if not is_saved(fused, adapted.saved):
            first = next(iter(layers.values()))
            pairs = {name: _factors(adapted, layer) for name, layer in layers.items()}
            yield (fused, *fused_factors(pairs, first.B.shape[0]), first.scaling)


def _factors(adapted: AdaptedModel, layer: AdaptedLinear) -> tuple[Tensor, Tensor]:
    b, a = layer.B.detach(), layer.A.detach()
    if layer.name in adapted.folded.pairs:
        folded_b, folded_a = adapted.folded.pairs[layer.name]
        return torch.cat((b, folded_b.to(b)), 1), torch.cat((a, folded_a.to(a)), 0)
    return b, a


def _spread(rank: int, rslora: bool) -> float:
    return math.sqrt(rank) if rslora else rank
