"""The layer over PEFT: attach, name, read, write and export LoRA adapters."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from fedlora_flwr.errors import InvalidValue, PrivacyViolation, unknown
from fedlora_flwr.layout import Layout, is_folded
from fedlora_flwr.lora.digests import digest, joined
from fedlora_flwr.lora.exported import is_saved, outermost, plain_name, write_adapter
from fedlora_flwr.lora.folded_weights import FoldedWeights
from fedlora_flwr.lora.seeded import seeded
from fedlora_flwr.lora.targets import (
    check_exportable,
    check_found_alone,
    check_head,
    check_targets,
    usual_targets,
)


@dataclass(frozen=True)
class LoRASpec:
    r"""The adapters that are attached to a backbone, and the modules that train directly.

    Parameters
    ----------
    rank : int
        Rank r of every adapter.
    alpha : float
        The update is scaled by ``alpha / rank`` (``alpha / sqrt(rank)`` with ``rslora``).
    dropout : float
        Probability with which an input of the adapter (not of the backbone) is dropped.
    targets : str
        Regular expression. A module gets an adapter if its whole name matches. Empty means the
        usual layers of the model's family in transformers.
    head : tuple[str, ...]
        Names of modules that train in full. Empty leaves the head frozen.
    rslora : bool
        Rank-stabilized scaling (arXiv 2312.03732).
    backbone_dropout : bool (default: True)
        Whether the backbone's own dropout (of units, attention or paths) is on in training.
    drawn : tuple[str, ...]
        Names of modules whose initial weights are drawn at random, whether they train or not. An
        export holds their weights in full.

    Examples
    --------
    >>> spec = LoRASpec(rank=4, alpha=8.0, dropout=0.0, targets=r"layers\.\d+\.q", head=("head",))
    >>> spec.backbone_dropout
    True
    """

    rank: int
    alpha: float
    dropout: float
    targets: str
    head: tuple[str, ...] = ()
    rslora: bool = False
    backbone_dropout: bool = True
    drawn: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class AdaptedLinear:
    """One linear layer with a LoRA adapter: ``y = W0 x + scaling * B (A x)``.

    ``A`` has shape (r, n) and ``B`` shape (m, r) for ``W0`` of shape (m, n).
    """

    name: str
    module: LoraLayer
    A: nn.Parameter
    B: nn.Parameter
    scaling: float
    dropout: nn.Module

    @property
    def base(self) -> nn.Module:
        """The frozen layer under the adapter."""
        base: nn.Module = self.module.base_layer
        return base

    @property
    def enabled(self) -> bool:
        """Whether the forward pass uses the adapter."""
        return not self.module.disable_adapters


@dataclass(frozen=True, eq=False)
class HeadLinear:
    """One linear layer of the head that trains in full."""

    name: str
    module: nn.Linear


class AdaptedModel:
    """A PEFT model whose trainable arrays have stable names.

    Parameters
    ----------
    model : PeftModel
        Model with one active LoRA adapter and, in ``modules_to_save``, the head if it trains.
    backbone_dropout : bool (default: True)
        Whether `train` turns on all dropout; otherwise it turns on the dropout of adapters only.
    drawn : tuple[str, ...]
        Names of modules that an export holds in full in addition to those that train.

    Raises
    ------
    PrivacyViolation
        Per-record gradients of a trainable part cannot be computed: DoRA and other variants,
        adapters on convolutions or embeddings, adapter biases, several active adapters, a head with
        layers other than `torch.nn.Linear`, or any other trainable parameter. The message names the
        part.

    Examples
    --------
    >>> from peft import LoraConfig, get_peft_model
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> config = LoraConfig(r=1, target_modules=["0"], modules_to_save=["2"])
    >>> adapted = AdaptedModel(get_peft_model(net, config))
    >>> {name: array.shape for name, array in adapted.read().items()}
    {'0.lora_A.weight': (1, 3), '0.lora_B.weight': (4, 1), '2.weight': (2, 4), '2.bias': (2,)}
    """

    def __init__(
        self, model: PeftModel, backbone_dropout: bool = True, drawn: tuple[str, ...] = ()
    ) -> None:
        self.model = model
        self.backbone_dropout = backbone_dropout
        self.recomputes = False  # See `fedlora_flwr.lora.gradient_checkpointing`.
        self.adapter = _single_adapter(model)
        self.layers = [
            _adapted_linear(name, module, self.adapter)
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer)
        ]
        self.head = list(self._head_linears())
        self.parameters: dict[str, nn.Parameter] = dict(self._named_parameters())
        self.folded = FoldedWeights(self.layers, model)
        trained = model.peft_config[self.adapter].modules_to_save or ()
        self.saved = outermost((*trained, *drawn))
        self.check()

    @cached_property
    def layout(self) -> Layout:
        """Names of the exchanged arrays, in model order."""
        return Layout.of(self.parameters)

    def check(self) -> None:
        """Refuse a model with trainable parameters that are not among the named arrays.

        Raises
        ------
        PrivacyViolation
            A parameter outside the named arrays is trainable, or an adapter is merged into its
            weight.
        """
        known = {id(parameter) for parameter in self.parameters.values()}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and id(parameter) not in known:
                raise PrivacyViolation(
                    f"Parameter {plain_name(name)!r} is trainable, but only LoRA factors and "
                    "linear heads are clipped record by record. Freeze it (requires_grad = False)."
                )
        for layer in self.layers:
            if layer.module.merged:
                raise PrivacyViolation(
                    f"The adapter of {layer.name!r} is merged into its weight. Unmerge it first."
                )

    def train(self) -> None:
        """Put the model in training mode; the backbone only if ``backbone_dropout`` is set."""
        self.model.train(self.backbone_dropout)
        for layer in self.layers:
            layer.dropout.train()

    def read(self, names: Iterable[str] | None = None) -> dict[str, NDArray[np.float32]]:
        """Copy arrays out of the model.

        Parameters
        ----------
        names : Iterable[str], optional
            Names of the arrays; all of them by default.

        Returns
        -------
        dict[str, ndarray]
            fp32 arrays, read-only, that share no memory with the model.
        """
        chosen = self.parameters if names is None else names
        copies = {
            name: np.array(self.parameters[name].detach().to("cpu", torch.float32).numpy())
            for name in chosen
        }
        for copied in copies.values():
            copied.flags.writeable = False
        return copies

    @property
    def rank(self) -> int:
        """Rank of the adapters."""
        return self.layers[0].A.shape[0]

    def resize(self, rank: int) -> None:
        """Give all adapters another rank; the scaling stays, and all values become zero."""
        for layer in self.layers:
            layer.A.data = layer.A.new_zeros((rank, layer.A.shape[1]))
            layer.B.data = layer.B.new_zeros((layer.B.shape[0], rank))

    def write(self, arrays: Mapping[str, NDArray[np.floating]]) -> None:
        """Copy arrays into the model; factors and head arrays that are left out keep their values.

        The product of a folded pair (`layout.folded_names`), times the scaling, is added to the
        frozen weight of the layer. Each call replaces what earlier calls folded in: a layer without
        a pair in this call gets its original weight back.

        Raises
        ------
        InvalidValue
            An array is unknown or has another shape. In this case no array is written.
        """
        self.folded.check(arrays)
        trainable = {name: array for name, array in arrays.items() if not is_folded(name)}
        for name, array in trainable.items():
            if name not in self.parameters:
                raise unknown("array", name, self.parameters)
            shape = tuple(self.parameters[name].shape)
            if array.shape != shape:
                raise InvalidValue(f"shape of {name}", array.shape, str(shape))
        _ = self._frozen_digests  # Compute and keep the digests before any weight is changed.
        with torch.no_grad():
            for name, array in trainable.items():
                self.parameters[name].copy_(torch.from_numpy(np.array(array)))
        self.folded.apply(arrays)

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter and buffer that is not exchanged, with its name in the model."""
        exchanged = {id(parameter) for parameter in self.parameters.values()}
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if id(tensor) not in exchanged:
                yield name, tensor

    @property
    def fingerprint(self) -> str:
        """Hash of all frozen arrays: their names, shapes, types and values."""
        return joined(found for _, found in self._frozen_digests)

    @property
    def backbone(self) -> str:
        """Hash of the frozen arrays that come from a checkpoint, not from random draws."""
        frozen = self._frozen_digests
        return joined(d for name, d in frozen if not is_saved(name.rpartition(".")[0], self.saved))

    @cached_property
    def _frozen_digests(self) -> list[tuple[str, bytes]]:
        named = [(plain_name(name), tensor) for name, tensor in self.frozen()]
        return [(name, digest(name, tensor)) for name, tensor in named]

    def export(self, folder: str | Path, promise: str = "") -> None:
        """Write an adapter folder that `peft.PeftModel.from_pretrained` loads onto the backbone.

        Loaded onto the original backbone, it gives the same model (see `exported.write_adapter`).
        ``promise`` is what the folder's card says of its privacy.
        """
        write_adapter(self, Path(folder), promise)

    def _head_linears(self) -> Iterable[HeadLinear]:
        for name, module in self.model.named_modules():
            if f".modules_to_save.{self.adapter}" not in f".{name}" or not list(
                module.parameters(recurse=False)
            ):
                continue
            if type(module) is not nn.Linear:
                raise PrivacyViolation(
                    f"The head's {plain_name(name)!r} is a {type(module).__name__}, and only "
                    "torch.nn.Linear is clipped record by record. Leave it out of the head."
                )
            yield HeadLinear(plain_name(name), module)

    def _named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        for layer in self.layers:
            yield f"{layer.name}.lora_A.weight", layer.A
            yield f"{layer.name}.lora_B.weight", layer.B
        for linear in self.head:
            for name, parameter in linear.module.named_parameters():
                yield f"{linear.name}.{name}", parameter


def attach(model: nn.Module, spec: LoRASpec, seed: int) -> AdaptedModel:
    """Attach LoRA adapters to a backbone and freeze the rest.

    Parameters
    ----------
    model : nn.Module
        The backbone with its head; it is changed in place.
    spec : LoRASpec
        Rank, scaling, targets and head.
    seed : int
        Seed of the random initial values of A; B starts at zero.

    Returns
    -------
    AdaptedModel
        The wrapped model, in eval mode.

    Raises
    ------
    InvalidValue
        The model has adapters already; ``spec.targets`` cannot be used (see
        `fedlora_flwr.lora.targets`); or a name in ``spec.head`` is not a module's name, or the name
        of another module, or of one that PEFT adds, ends with it.
    PrivacyViolation
        A trainable part cannot be clipped record by record (see `AdaptedModel`).

    Examples
    --------
    >>> spec = LoRASpec(rank=2, alpha=4.0, dropout=0.0, targets="0")
    >>> adapted = attach(nn.Sequential(nn.Linear(3, 4)), spec, seed=1)
    >>> list(adapted.parameters), adapted.layers[0].scaling
    (['0.lora_A.weight', '0.lora_B.weight'], 2.0)
    """
    if any(isinstance(module, PeftModel | LoraLayer) for module in model.modules()):
        allowed = "one without PEFT's adapters: they are attached here. Return the plain model"
        raise InvalidValue("model", type(model).__name__, allowed)
    targets = spec.targets or usual_targets(
        model, spec.head, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    )
    check_targets(model, targets, spec.head)
    check_head(model, spec.head)
    check_found_alone((*spec.head, *spec.drawn))
    check_exportable(model, targets, spec.drawn)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type,unused-ignore]
        lora_dropout=spec.dropout,
        target_modules=targets,
        modules_to_save=list(spec.head) or None,
        use_rslora=spec.rslora,
        bias="none",
    )
    with seeded(seed % 2**63), warnings.catch_warnings():
        # These two warnings of PEFT need no action: it uses deprecated functions of transformers,
        # and it detects and handles the transposed weights of GPT-2's layers itself.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        adapted = AdaptedModel(get_peft_model(model, config), spec.backbone_dropout, spec.drawn)
    adapted.model.eval()
    return adapted


def _single_adapter(model: PeftModel) -> str:
    active = model.active_adapters
    if len(active) != 1:
        raise PrivacyViolation(f"Adapters {active} are active at once; activate exactly one.")
    return str(active[0])


def _adapted_linear(name: str, module: LoraLayer, adapter: str) -> AdaptedLinear:
    plain = plain_name(name)
    if adapter not in module.lora_A or not isinstance(module.lora_A[adapter], nn.Linear):
        kind = type(module.get_base_layer()).__name__
        raise PrivacyViolation(
            f"Layer {plain!r} is a {kind}; adapters are clipped record by record on linear layers "
            "only. Leave it out of the targets."
        )
    if adapter in module.lora_variant:
        variant = type(module.lora_variant[adapter]).__name__
        raise PrivacyViolation(f"Layer {plain!r} uses {variant}; only plain LoRA is supported.")
    if module.lora_bias[adapter]:
        raise PrivacyViolation(f"Layer {plain!r} trains an adapter bias; set lora_bias = False.")
    return AdaptedLinear(
        name=plain,
        module=module,
        A=module.lora_A[adapter].weight,
        B=module.lora_B[adapter].weight,
        scaling=float(module.scaling[adapter]),
        dropout=module.lora_dropout[adapter],
    )
