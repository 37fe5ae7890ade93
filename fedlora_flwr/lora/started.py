"""The arrays from which a run starts: fresh, made from the weights, or a PEFT adapter's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import is_folded
from fedlora_flwr.lora.adapters import AdaptedModel
from fedlora_flwr.lora.exported import BACKBONE, plain_name
from fedlora_flwr.lora.weight_starts import RANDOM, weight_start

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def start_of(config: RunConfig, adapted: AdaptedModel) -> dict[str, NDArray[np.float32]]:
    """Write a run's start into its model, and return all arrays of it.

    Parameters
    ----------
    config : RunConfig
        Its ``start`` and ``lora-init``.
    adapted : AdaptedModel
        The run's model, before any training.

    Returns
    -------
    dict[str, ndarray]
        Factors and head arrays by name, and the folded pairs if the start has some, fp32.

    Raises
    ------
    InvalidValue
        See `read_adapter` and `fedlora_flwr.lora.weight_starts.check_start`.
    """
    made: dict[str, NDArray[np.float32]] = {}
    if config.start:
        made = read_adapter(Path(config.start), adapted)
    elif config.lora_init != RANDOM:
        made = weight_start(adapted, config.lora_init)
    if made:
        adapted.write(made)
    return {**adapted.read(), **{name: array for name, array in made.items() if is_folded(name)}}


def read_adapter(folder: Path, adapted: AdaptedModel) -> dict[str, NDArray[np.float32]]:
    """Read the arrays from which a run starts, and refuse an adapter of another model.

    Parameters
    ----------
    folder : Path
        A folder that PEFT's ``save_pretrained`` has written, or a run's ``adapter/``.
    adapted : AdaptedModel
        The run's model, before any training; it does not change.

    Returns
    -------
    dict[str, ndarray]
        Factors and head arrays by name, fp32.

    Raises
    ------
    InvalidValue
        The folder cannot be read, or its names, shapes, scaling or backbone differ from the run's.
    """
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        found = {plain_name(key): value for key, value in load_file(folder / _WEIGHTS).items()}
        known = folder / BACKBONE
        backbone = known.read_text(encoding="ascii").strip() if known.exists() else ""
    except Exception as error:  # The error type of safetensors is not public.
        allowed = f"a PEFT adapter's folder, with {_CONFIG} and {_WEIGHTS} ({error})"
        raise InvalidValue("start", str(folder), allowed) from error
    _check_backbone(folder, config, backbone, adapted)
    own = {name: tuple(parameter.shape) for name, parameter in adapted.parameters.items()}
    for name, shape in own.items():
        if name not in found:
            raise InvalidValue("start", str(folder), f"an adapter that has {name!r}")
        if (there := tuple(found[name].shape)) != shape:
            allowed = f"an adapter in which {name} has the shape {shape}, not {there}"
            allowed += ". Set the adapter's rank and lora-targets"
            raise InvalidValue("start", str(folder), allowed)
    frozen = {plain_name(name): tensor for name, tensor in adapted.model.named_parameters()}
    for name in found.keys() - own.keys():
        if name not in frozen or not bool((frozen[name].cpu() == found[name]).all()):
            allowed = f"an adapter without {name!r}, which the run does not train"
            raise InvalidValue("start", str(folder), allowed)
    return {name: found[name].float().numpy() for name in own}


def _check_backbone(
    folder: Path, config: dict[str, Any], backbone: str, adapted: AdaptedModel
) -> None:
    if backbone and backbone != adapted.backbone:
        allowed = "an adapter of this run's backbone, but it is for other frozen weights"
        raise InvalidValue("start", str(folder), allowed)
    made = (config.get("auto_mapping") or {}).get("base_model_class")
    own = type(adapted.model.get_base_model()).__name__
    if made not in (None, own):
        raise InvalidValue("start", str(folder), f"an adapter of a {own}, not of a {made}")
    rank, alpha = config.get("r", 0), config.get("lora_alpha", 0)
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) if rank else 0.0
    usual = adapted.layers[0].scaling
    if config.get("rank_pattern") or not math.isclose(scaling, usual):
        allowed = (
            f"an adapter of one rank with the scaling {usual:g} of this run's lora-alpha, rank and "
            f"rslora, but its scaling is {scaling:g}"
        )
        raise InvalidValue("start", str(folder), allowed)
