"""Timm models by name, from a folder, or with weights from a file."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedlora_flwr.config.sections import TaskSection
from fedlora_flwr.data.hub import hub_answers, own_copies_only
from fedlora_flwr.data.light_timm import light_timm
from fedlora_flwr.errors import InvalidValue, one_line
from fedlora_flwr.files import cache_folder
from fedlora_flwr.lora.fused_layers import SplitLinear, split_fused
from fedlora_flwr.lora.seeded import seeded_on_cpu

SMALL_SWIN = "small-swin"
# Patterns of layers to adapt. `_LAYERS` begins with queries, keys, values and the projection, as in
# the published protocols on Swin; the others are for models without such layers.
_SPLIT = r"(.*\.)?attn\.qkv\.[qv]"
_LAYERS = (
    r"(.*\.)?blocks\.\d+\.attn\.(qkv|proj)",
    r"(.*\.)?blocks\.\d+\.attn\.proj",
    r"(.*\.)?attn\.(qkv|q|kv|proj)",
    r"(.*\.)?(mlp|mlp_channels)\.fc[12]",
)


def build(settings: TaskSection, num_classes: int, seed: int) -> nn.Module:
    """Return the model. If the weights are for other classes, the seed draws a new classifier.

    Parameters
    ----------
    settings : TaskSection
        Model, weights and size of pictures.
    num_classes : int
        Outputs of the classifier.
    seed : int
        Seed of the weights that are drawn.

    Raises
    ------
    InvalidValue
        The model does not exist, or its weights cannot be read or do not fit.
    """
    if settings.quantization != "none":
        allowed = "'none' for image models: only transformers models can be quantized"
        raise InvalidValue("quantization", settings.quantization, allowed)
    file = settings.weights
    if file == "pretrained" and (folder := _folder(settings.model)) is not None:
        file = _weights_in(folder)
    with seeded_on_cpu(seed):
        model = _create(settings, num_classes, pretrained=file == "pretrained")
    if file not in ("pretrained", "random"):
        _load(model, file)
    if settings.split_qkv:
        split_fused(model)
    return model


def skeleton(settings: TaskSection, num_classes: int, device: str = "meta") -> nn.Module:
    """Return the model without its weights, to know its modules and their names.

    On the meta device it has only shapes; on another one its weights are random.
    """
    with torch.device(device):
        model = _create(settings, num_classes, pretrained=False)
        if settings.split_qkv:
            split_fused(model)
    return model


def classifier_modules(model: Any) -> tuple[str, ...]:
    """Return the names of a timm model's classifier modules."""
    found = model.get_classifier()
    chosen = found if isinstance(found, tuple) else (found,)
    return tuple(
        name for name, module in model.named_modules() if any(module is one for one in chosen)
    )


def usual_layers(model: nn.Module) -> str:
    """Return the default pattern of the layers of a timm model that get an adapter.

    It is the first of `_LAYERS` that matches only linear layers. If none does, it is the first of
    all, and `fedlora_flwr.lora.targets.check_targets` then lists the layers to choose from.
    """
    named = dict(model.named_modules())
    if any(isinstance(module, SplitLinear) for module in named.values()):
        return _SPLIT  # Queries and values, as in the original paper on LoRA.
    for pattern in _LAYERS:
        found = [name for name in named if re.fullmatch(pattern, name)]
        linear = all(isinstance(named[name], nn.Linear) for name in found)
        if found and linear and not any(_bypassed(named, name) for name in found):
            return pattern
    return _LAYERS[0]


def _bypassed(named: dict[str, nn.Module], layer: str) -> bool:
    """Tell whether attention reads a layer's weight instead of calling the layer.

    BEiT, EVA and Swin V2 do so if only queries and values have a bias.
    """
    attention: Any = named[layer.rpartition(".")[0]]
    joined = getattr(attention, "q_bias", None) is not None
    return layer.endswith(".qkv") and joined and not getattr(attention, "qkv_bias_separate", False)


def data_config(model: nn.Module, image_size: int) -> dict[str, Any]:
    """Return how timm prepares pictures for a model.

    Parameters
    ----------
    model : nn.Module
        A timm model; its weights are not read.
    image_size : int
        Height and width in pixels; 0 for the model's own.

    Returns
    -------
    dict[str, Any]
        ``input_size`` (channels, height, width), ``interpolation``, ``mean``, ``std``,
        ``crop_pct`` and ``crop_mode``.
    """
    from timm.data import resolve_model_data_config

    args = {"input_size": (3, image_size, image_size)} if image_size else {}
    found = resolve_model_data_config(model, args=args)
    kept = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return {key: list(v) if isinstance(v := found[key], tuple) else v for key in kept}


def model_folder(name: str) -> Path:
    """Return the folder in which `fedlora pretrain` keeps the model called ``name``."""
    return cache_folder() / "models" / name


def _create(settings: TaskSection, num_classes: int, *, pretrained: bool) -> nn.Module:
    timm = light_timm()
    model, folder = settings.model, _folder(settings.model)
    if folder is not None:
        model = f"local-dir:{folder}"
    elif ":" not in model and not timm.is_model(model):
        raise _unknown(model)
    # If the hub does not answer, timm may still find the model in its own cache.
    remote = folder is None and (pretrained or ":" in model)
    away = remote and not hub_answers()
    try:
        with _quiet(), own_copies_only(away):
            return _sized(model, settings.image_size, pretrained, num_classes)
    except Exception as error:
        # A model's constructor, a hub and two file formats raise errors of many types.
        if away and isinstance(error, OSError):
            allowed = (
                "a folder with a timm model, or weights = a file of its weights: the hub that has "
                "them did not answer, and there is no copy from before"
            )
        else:
            reason = f"{type(error).__name__}: {one_line(error)}"
            allowed = f"a timm model that can be built ({reason})"
        raise InvalidValue("model", settings.model, allowed) from error


def _folder(model: str) -> Path | None:
    """Return a model's folder if the name is a folder or `fedlora pretrain` made the model."""
    for folder in (Path(model).expanduser(), model_folder(model)):
        if (folder / "config.json").is_file():
            return folder
    return None


def _weights_in(folder: Path) -> str:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return str(folder / name)
    allowed = "a folder with model.safetensors, or weights = 'random' or a file"
    raise InvalidValue("model", str(folder), allowed)


def _sized(model: str, size: int, pretrained: bool, num_classes: int) -> nn.Module:
    timm = light_timm()
    options: dict[str, Any] = {"pretrained": pretrained, "num_classes": num_classes}
    if size:
        try:
            built: nn.Module = timm.create_model(model, **options, img_size=size)
        except TypeError as error:
            # Convolutional models take pictures of any size and do not have this argument.
            if "img_size" not in str(error):
                raise
        else:
            return built
    return timm.create_model(model, **options)  # type: ignore[no-any-return,unused-ignore]


def _unknown(model: str) -> InvalidValue:
    import difflib

    timm = light_timm()
    if model == SMALL_SWIN:
        allowed = f"a model that exists. Make this one with `fedlora pretrain {SMALL_SWIN}`"
    elif Path(model).expanduser().is_dir():
        allowed = "a folder with config.json and weights, as timm.models.save_for_hf writes it"
    else:
        near = difflib.get_close_matches(model, timm.list_models(), n=3, cutoff=0.4)
        allowed = "a folder, or a name that timm knows" + (f", e.g. {near}" if near else "")
    return InvalidValue("model", model, allowed)


def _load(model: Any, file: str) -> None:
    """Load a file of weights, except for a classifier of another shape."""
    from timm.models import load_state_dict

    path = Path(file).expanduser()
    if not path.is_file():
        allowed = "'pretrained', 'random' or a file that exists"
        raise InvalidValue("weights", file, allowed)
    try:
        state = _converted(load_state_dict(str(path), weights_only=True), model)
    except Exception as error:
        allowed = f"safetensors or a PyTorch file ({one_line(error)})"
        raise InvalidValue("weights", file, allowed) from error
    own = model.state_dict()
    heads = tuple(f"{name}." for name in classifier_modules(model))
    for name in list(state):
        if name.startswith(heads) and name in own and state[name].shape != own[name].shape:
            del state[name]
    wrong = [n for n, v in state.items() if n not in own or own[n].shape != v.shape]
    missing = [name for name in own if name not in state and not name.startswith(heads)]
    if wrong or missing:
        name = (wrong or missing)[0]
        allowed = f"weights of this model: {name!r} {'does not fit' if wrong else 'is missing'}"
        raise InvalidValue("weights", file, allowed)
    model.load_state_dict(state, strict=False)


def _converted(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert weights to the model's names and shapes, as timm does with files that it downloads.

    Files of a model's authors may have other names, or positions for pictures of another size.
    """
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return state if convert is None else convert(state, model)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress timm's notes on heads that it does not load."""
    loggers = [logging.getLogger(name) for name in ("timm", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
