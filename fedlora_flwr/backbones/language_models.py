"""Transformers models and tokenizers, from the hub or from a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from fedlora_flwr.config.sections import TaskSection
from fedlora_flwr.data.hub import hub_answers, own_copies_only
from fedlora_flwr.errors import InvalidValue, one_line, require
from fedlora_flwr.lora.exported import DRAWN
from fedlora_flwr.lora.seeded import seeded_on_cpu

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_Found = TypeVar("_Found")
HEAD_FILE = "classifier.safetensors"


def load_config(settings: TaskSection, **changes: Any) -> PretrainedConfig:
    """Return the model's configuration.

    Parameters
    ----------
    settings : TaskSection
        The run's settings; ``model`` is read.
    **changes : Any
        Fields to set, e.g. ``num_labels``.

    Raises
    ------
    InvalidValue
        The model is not on this machine, nor on a hub that can be reached.
    """
    from transformers import AutoConfig

    return _fetched(settings.model, lambda **where: AutoConfig.from_pretrained(**where, **changes))


def load_tokenizer(settings: TaskSection) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer, with a token for padding.

    Raises
    ------
    InvalidValue
        The model has no tokenizer, or it cannot be reached.
    """
    from transformers import AutoTokenizer

    tokenizer = _fetched(settings.model, lambda **where: AutoTokenizer.from_pretrained(**where))
    if not tokenizer.is_fast:
        raise InvalidValue("model", settings.model, "a model with a fast tokenizer")
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        # The library makes an empty tokenizer if a folder has none.
        raise InvalidValue("model", settings.model, "a model with a tokenizer beside it")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            allowed = "a model whose tokenizer has a token for padding, or for the end of a text"
            raise InvalidValue("model", settings.model, allowed)
        # Padding is masked, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def input_names(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> list[str]:
    """Return the names of a tokenizer's outputs that a model takes as inputs.

    The mask is always among them, as batches are padded. ``token_type_ids``, the number of a
    token's text in a pair, is among them only if the model has two types: GPT-2 would take it for a
    word.
    """
    tells = getattr(config, "type_vocab_size", 0) > 1
    types = ["token_type_ids"] if tells and "token_type_ids" in tokenizer.model_input_names else []
    return ["input_ids", "attention_mask", *types]


def check_length(limit: int, model: nn.Module) -> None:
    """Refuse a ``max-length`` that is longer than a model reads.

    Raises
    ------
    InvalidValue
        ``max-length`` is too large.
    """
    longest = most_positions(model)
    if longest is not None and limit > longest:
        raise InvalidValue("max-length", limit, f"at most {longest}, what the model reads")


def most_positions(model: nn.Module) -> int | None:
    """Return the most tokens that a transformers model reads; None if it has no limit."""
    config: Any = model.config
    longest: int | None = getattr(config, "max_position_embeddings", None)
    if longest is not None and longest <= 0:  # XLNet says so that it has no limit.
        longest = None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa's first position comes after the one that stands for padding.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            there = module.num_embeddings - first
            longest = there if longest is None else min(longest, there)
    return longest


def skeleton(auto: Any, config: PretrainedConfig, device: str = "meta") -> nn.Module:
    """Return the model without the checkpoint's weights, to know its modules and their names.

    Parameters
    ----------
    auto : type
        One of transformers' auto classes.
    config : PretrainedConfig
        The configuration that `load_config` returned.
    device : str (default: "meta")
        ``"meta"`` for shapes only; on another device the weights are random.

    Raises
    ------
    InvalidValue
        No model of this family can do the task.
    """
    try:
        with torch.device(device):
            model: nn.Module = auto.from_config(config, dtype=torch.float32)
    except InvalidValue:
        raise
    except Exception as error:
        reason = "" if isinstance(error, ValueError) else f" ({one_line(error)})"
        allowed = f"a model for this task, not one of type {config.model_type!r}{reason}"
        raise InvalidValue("model", config.name_or_path, allowed) from error
    return model


class MeanPooledClassifier(nn.Module):
    """A linear classifier on the mean of a backbone's last hidden states over a text's tokens.

    Sentence encoders are trained for this mean. Transformers' own classifiers read the state of the
    first token, which such encoders may not use.

    Parameters
    ----------
    backbone : nn.Module
        A transformers model without a head.
    num_labels : int
        Classes.
    """

    base_model_prefix = "backbone"

    def __init__(self, backbone: Any, num_labels: int) -> None:
        super().__init__()
        self.config = backbone.config
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.config.hidden_size, num_labels)

    def forward(self, attention_mask: Tensor, **inputs: Tensor) -> SequenceClassifierOutput:
        """Return ``logits``, shape (n, classes), for inputs of shape (n, t).

        Raises
        ------
        InvalidValue
            The backbone has a decoder that does not read the text.
        """
        try:
            states = self.backbone(attention_mask=attention_mask, **inputs).last_hidden_state
        except ValueError as error:
            if not getattr(self.config, "is_encoder_decoder", False):
                raise
            allowed = f"'model' for a model of type {self.config.model_type!r}, as its decoder"
            raise InvalidValue("pooling", "mean", f"{allowed} does not read the text") from error
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        means = (states * mask).sum(1) / mask.sum(1).clamp_min(1)
        return SequenceClassifierOutput(logits=self.classifier(means.to(self.classifier.weight)))


class MeanPooled:
    """Builds a `MeanPooledClassifier` with the methods of transformers' auto classes."""

    @staticmethod
    def from_config(config: PretrainedConfig, **options: Any) -> nn.Module:
        """Return a model with random weights."""
        from transformers import AutoModel

        return MeanPooledClassifier(AutoModel.from_config(config, **options), config.num_labels)

    @staticmethod
    def from_pretrained(*, config: PretrainedConfig, **options: Any) -> tuple[nn.Module, Any]:
        """Return a pretrained backbone with a new classifier, and the report of loaded weights."""
        from transformers import AutoModel

        backbone, report = AutoModel.from_pretrained(config=config, **options)
        model = MeanPooledClassifier(backbone, config.num_labels)
        missing = {f"{model.base_model_prefix}.{name}" for name in report["missing_keys"]}
        classifier = {f"classifier.{name}" for name, _ in model.classifier.named_parameters()}
        return model, {**report, "missing_keys": missing | classifier}


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules outside a transformers model's backbone that can train.

    A module with layers that are not linear, such as ModernBERT's normalization, is represented by
    its linear layers.
    """
    names: list[str] = []
    for name in _beside(model):
        leaves = {
            f"{name}.{inner}".rstrip("."): module
            for inner, module in model.get_submodule(name).named_modules()
            if list(module.parameters(recurse=False))
        }
        linear = [leaf for leaf, module in leaves.items() if isinstance(module, nn.Linear)]
        names += [name] if len(linear) == len(leaves) else linear
    return tuple(names)


def _beside(model: nn.Module) -> tuple[str, ...]:
    backbone = getattr(model, "base_model_prefix", "")
    children = dict(model.named_children())
    return tuple(
        name
        for name, child in children.items()
        if name != backbone
        and any(True for _ in child.parameters())
        # T5 for questions has the parts of its backbone at the same level as the head.
        and (backbone in children or not isinstance(child, (PreTrainedModel, nn.Embedding)))
    )


def build(auto: Any, settings: TaskSection, config: PretrainedConfig, seed: int) -> nn.Module:
    """Return the model. The seed draws weights that the checkpoint lacks, such as the head's.

    A head of the checkpoint for other classes is replaced by a new one.

    Parameters
    ----------
    auto : type
        One of transformers' auto classes.
    settings : TaskSection
        Model, weights and quantization.
    config : PretrainedConfig
        The configuration that `load_config` returned.
    seed : int
        Seed of the weights that are drawn.

    Raises
    ------
    InvalidValue
        ``max-length`` is more than the model reads, the weights cannot be read or belong to another
        model, or this machine cannot quantize.
    """
    if settings.weights not in ("pretrained", "random"):
        allowed = "'pretrained' or 'random'; for a folder of your own set model"
        raise InvalidValue("weights", settings.weights, allowed)
    bare = skeleton(auto, config)
    check_length(settings.max_length, bare)
    options = quantized(settings.quantization, head_modules(bare))
    with seeded_on_cpu(seed):
        if settings.weights == "random":
            model: nn.Module = skeleton(auto, config, "cpu")
            setattr(model, DRAWN, _beside(bare))
            return model
        model, report = _fetched(
            settings.model,
            lambda **where: auto.from_pretrained(
                **where,
                config=config,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            ),
        )
    missing = _drawn_weights(report)
    _check_weights(settings.model, missing, _beside(bare))
    setattr(model, DRAWN, tuple(sorted({name.rpartition(".")[0] for name in missing})))
    return model


def save(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model and its tokenizer, as transformers' ``from_pretrained`` reads them.

    For a `MeanPooledClassifier`, the folder holds the backbone, which ``AutoModel`` reads, and
    ``classifier.safetensors``, the layer that reads the mean of its last hidden states.

    Parameters
    ----------
    model : nn.Module
        The model.
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer.
    folder : Path
        The folder; it is made if missing.
    """
    plain = model
    if isinstance(model, MeanPooledClassifier):
        from safetensors.torch import save_file

        plain = model.backbone
        folder.mkdir(parents=True, exist_ok=True)
        layer = {name: t.detach().cpu() for name, t in model.classifier.state_dict().items()}
        save_file(layer, folder / HEAD_FILE)
    with _quiet():
        plain.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))


def _drawn_weights(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of weights that were drawn, and why each was drawn."""
    missing = dict.fromkeys(report["missing_keys"], "is missing")
    return {**missing, **{name: "does not fit" for name, *_ in report["mismatched_keys"]}}


def _check_weights(model: str, drawn: Mapping[str, str], beside: tuple[str, ...]) -> None:
    """Refuse a backbone with weights that were missing from the checkpoint and had to be drawn."""
    for name in sorted(drawn):
        # A missing pooler is fine: backbones may be trained without one, and few heads read it.
        if name.split(".")[0] not in beside and "pooler" not in name.split("."):
            raise InvalidValue("model", model, f"weights of this model: {name!r} {drawn[name]}")


def quantized(quantization: str, head: tuple[str, ...]) -> dict[str, Any]:
    """Return the arguments with which `from_pretrained` quantizes the backbone but not the head.

    Raises
    ------
    InvalidValue
        This machine has no CUDA device.
    NotInstalled
        bitsandbytes is not installed.
    """
    if quantization == "none":
        return {}
    if not torch.cuda.is_available():
        raise InvalidValue("quantization", quantization, "'none' on a machine without a CUDA GPU")
    require("quantized")
    from transformers import BitsAndBytesConfig

    options = (
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(head) or None)
        if quantization == "8bit"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=list(head) or None,
        )
    )
    return {"quantization_config": options, "device_map": {"": torch.cuda.current_device()}}


def _fetched(model: str, load: Callable[..., _Found]) -> _Found:
    path = Path(model).expanduser()
    local = path.is_dir()
    offline = not local and not hub_answers()
    where = {
        "pretrained_model_name_or_path": str(path) if local else model,
        "local_files_only": local or offline,
    }
    try:
        with _quiet(), own_copies_only(offline):
            return load(**where)
    except Exception as error:
        # Parsers of configurations and of three formats of weights raise errors of many types.
        if offline and isinstance(error, OSError):
            allowed = (
                "a folder with a transformers model, or a name on a hub that can be reached: it "
                "did not answer, and there is no copy from before"
            )
        else:
            allowed = f"a transformers model ({one_line(error)})"
        raise InvalidValue("model", model, allowed) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the library's report that a head is new. It always is in this package."""
    from transformers.utils import logging as library

    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()
