"""The layers below the first that trains, computed once per record.

These layers are frozen, so they make the same activations of a record in every round. The cache
looks the activations up by what the model reads, and the model continues from there. Tasks, engine
and evaluation do not know of it: they call the model, and its results have the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.sections import DataSection, LoRASection, TaskSection
from fedlora_flwr.files import cache_folder
from fedlora_flwr.layout import factor_of
from fedlora_flwr.lora.activations import Activations
from fedlora_flwr.lora.adapters import AdaptedModel
from fedlora_flwr.lora.digests import digest
from fedlora_flwr.lora.model_call import Call
from fedlora_flwr.lora.precision import kernels_of
from fedlora_flwr.lora.prefix_search import Cut, Template, find_cut, prefix_of, standing_in

# With fewer rows, a matrix product may add up in another order. Its last bits then differ.
_LEAST_ROWS = 4


class PrefixCache:
    """Keeps what a model's frozen first layers make of each record.

    It acts on every call of the model: in training, evaluation and checks. A call whose inputs it
    cannot tell apart by record runs as if it were not there, and so does a call of fewer than four
    records. Where the first layers use random numbers, as dropout does, nothing is kept.

    Parameters
    ----------
    adapted : AdaptedModel
        The model. It keeps its two hooks on it for as long as the model lives.
    limit : int
        Largest size in bytes of the file with the activations.
    settings : str, optional
        All settings that decide on what the model computes from its weights, where rows are kept
        between runs. A later model of this process finds them if its settings are the same, and
        its weights below the cut. By default the file is this model's own.

    Notes
    -----
    *Where it cuts.* The first call is observed: the cut is after the last module that has ended
    before the first trained module begins. Its output must not depend on a trained parameter, which
    autograd tells. Modules before the cut are left out from then on and return NaN. A cut is used
    only if the whole model then gives the same bits as without it, on the records of this call and
    with other records beside them.

    *What it keeps.* Activations of private records are as private as the records. They stay in this
    process and in its file without a name (see `Activations`).
    """

    _between_runs: ClassVar[dict[int, Activations] | None] = None

    def __init__(
        self,
        adapted: AdaptedModel,
        limit: int,
        settings: str = "",
    ) -> None:
        self._adapted, self._settings = adapted, settings
        self._kept = Activations(cache_folder() / "activations", limit)
        if settings and self._between_runs is not None:
            self._kept = self._between_runs.setdefault(limit, self._kept)
        self._factors = True
        self._cuts: dict[tuple[bool, bool, bool], Cut | None] = {}
        self._state: object = None
        self._digest = b""
        self._digests: dict[int, tuple[tuple[int, int], bytes]] = {}
        self._serving = ExitStack()
        self._busy = False
        adapted.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        adapted.model.register_forward_hook(self._end, always_call=True)

    @classmethod
    def of(cls, config: RunConfig, adapted: AdaptedModel) -> PrefixCache | None:
        """Return the cache of a run's model; ``None`` if the run has none.

        A compiled model has none, since it doesn't call its modules one by one. Neither has a model
        with gradient checkpointing: it calls modules again in the backward pass, when nothing
        stands in for those that were left out.
        """
        limit = int(config.prefix_cache * 2**30)
        other = config.compile != "none" or config.gradient_checkpointing
        if not limit or other:
            return None
        return cls(adapted, limit, "" if cls._between_runs is None else _settings(config))

    @classmethod
    def keep_between_runs(cls, keep: bool) -> None:
        """Let models that this process builds from now on find rows of earlier ones, or not.

        Runs that are compared read the same records with the same frozen weights.

        Parameters
        ----------
        keep : bool
            If not, what has been kept for later runs is forgotten.
        """
        if not keep:
            cls._between_runs = None
        elif cls._between_runs is None:
            cls._between_runs = {}

    def follow(self, trained: Iterable[str]) -> None:
        """Learn which arrays train from now on.

        Parameters
        ----------
        trained : Iterable[str]
            Names of arrays. If no factor is among them, the layers up to the head are frozen.
        """
        self._factors = any(factor_of(name) is not None for name in trained)

    def __len__(self) -> int:
        return len(self._kept)

    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if self._busy:
            return
        call = Call.read(model, args, kwargs)
        if call is None or call.rows < _LEAST_ROWS:
            return
        self._busy = True
        try:
            # In here gradients are off, and the kernels must be those of the call all the same.
            with kernels_of(torch.is_grad_enabled()):
                cut = self._cut(call)
                served = None if cut is None else self._values(cut, call)
            if cut is not None and served is not None:
                self._serving.enter_context(standing_in(cut, *served, call.rows))
        finally:
            self._busy = False

    def _end(self, *_: Any) -> None:
        if not self._busy:
            self._serving.close()

    def _mode(self) -> tuple[bool, bool, bool]:
        """Return what decides on a call's cut, and on its bits, besides records and weights."""
        return self._factors, self._adapted.model.training, torch.is_grad_enabled()

    def _cut(self, call: Call) -> Cut | None:
        """Return where to cut; searched for once per mode, in the first call of enough records."""
        mode = self._mode()
        if mode not in self._cuts:
            if call.rows <= _LEAST_ROWS:
                return None
            first = [layer.module for layer in self._adapted.layers] if self._factors else []
            starts: list[nn.Module] = [*first, *(part.module for part in self._adapted.head)]
            trained = [
                parameter
                for name, parameter in self._adapted.parameters.items()
                if self._factors or factor_of(name) is None
            ]
            self._cuts[mode] = find_cut(call, starts, trained)
        return self._cuts[mode]

    def _values(self, cut: Cut, call: Call) -> tuple[Tensor, Sequence[Template]]:
        """Return the cut's output for all rows, and the forms of what is left out."""
        self._refresh(cut)
        keys = call.keys(self._digest + bytes(self._mode()) + cut.place.encode())
        templates = cut.templates.get(call.form)
        missing = [n for n, key in enumerate(keys) if key not in self._kept]
        if templates is None and not missing:
            missing = [0]  # One record shows what stands in for the modules.
        if not missing and templates is not None:
            return self._kept.read(keys, cut.like[call.form]).to(call.device), templates
        part = (missing + missing[:1] * _LEAST_ROWS)[: max(len(missing), _LEAST_ROWS)]
        fresh, templates = prefix_of(call.of(part), cut)
        cut.templates[call.form] = templates
        cut.like[call.form] = torch.empty_like(fresh[:1], device="cpu")
        fresh = fresh[: len(missing)]
        self._kept.keep([keys[n] for n in missing], fresh)
        if len(missing) == len(keys):
            return fresh, templates
        value = fresh.new_empty((len(keys), *fresh.shape[1:]))
        value[missing] = fresh
        absent = set(missing)
        known = [n for n in range(len(keys)) if n not in absent]
        held = self._kept.read([keys[n] for n in known], cut.like[call.form])
        value[known] = held.to(value.device)
        return value, templates

    def _refresh(self, cut: Cut) -> None:
        """Forget all rows if the weights below the cut have changed."""
        state = [(p.data_ptr(), p._version) for p in cut.tensors]
        if state == self._state:
            return
        exchanged = {id(p) for p in self._adapted.parameters.values()}
        found = hashlib.blake2b(self._settings.encode(), digest_size=16)
        for number, (tensor, now) in enumerate(zip(cut.tensors, state, strict=True)):
            # An array that a server sends may be written again with the same values, and another
            # run reads the same checkpoint.
            if self._settings or id(tensor) in exchanged:
                found.update(self._contents(tensor, now))
            else:
                found.update(repr((number, now)).encode())
        if found.digest() != self._digest:
            if not self._settings or self._kept.mostly_full:
                self._kept.clear()
            self._digest = found.digest()
        self._state = state

    def _contents(self, tensor: Tensor, state: tuple[int, int]) -> bytes:
        """Return a digest of a tensor, which is computed again once it has been written."""
        before, found = self._digests.get(id(tensor), (None, b""))
        if before != state:
            found = digest("", tensor)
            self._digests[id(tensor)] = state, found
        return found


def _settings(config: RunConfig) -> str:
    """Return the settings on which frozen layers may depend, beside their weights."""
    sections = (TaskSection, DataSection, LoRASection)
    names = [field.name for section in sections for field in fields(section)]
    names += ["precision", "device", "client_threads"]
    return repr([(name, getattr(config, name)) for name in names])
