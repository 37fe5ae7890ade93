"""``precision = "auto"``: which precision is faster on this machine, measured once and kept."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from fedlora_flwr.environment import processor
from fedlora_flwr.errors import explained
from fedlora_flwr.files import FileTrouble, cache_folder, read_or_make, to_json
from fedlora_flwr.lora.precision import run_in_bf16

THRESHOLD = 1.2
"""How many times as fast the products must be in bf16 for bf16 to be chosen."""

_LOGGER = logging.getLogger(__name__)
_ROWS = 256
_LARGEST = 2048  # A larger product takes longer, and its ratio hardly differs.
_USUAL = (768, 768)  # For a model without a linear layer that stays frozen.
_WARM, _TURNS = 2, 7


@dataclass(frozen=True)
class Speeds:
    """Seconds of one layer's products in both precisions.

    Parameters
    ----------
    fp32, bf16 : float
        Seconds in each.

    Examples
    --------
    >>> Speeds(fp32=3.0, bf16=1.0).precision, Speeds(fp32=1.0, bf16=1.0).precision
    ('bf16', 'fp32')
    """

    fp32: float
    bf16: float

    @property
    def ratio(self) -> float:
        """How many times as fast bf16 is as fp32."""
        return self.fp32 / self.bf16

    @property
    def precision(self) -> str:
        """The precision to choose: ``"bf16"`` from `THRESHOLD` on, ``"fp32"`` below it."""
        return "bf16" if self.ratio >= THRESHOLD else "fp32"

    def __str__(self) -> str:
        """Say what is chosen and why, in one line."""
        found = f"bf16 is {self.ratio:.2g} times as fast as fp32 in products of this model's size"
        return f"{self.precision}, chosen on this machine: {found} (bf16 from {THRESHOLD:g} on)"


@dataclass(frozen=True)
class Product:
    """The products that are measured, and where.

    Parameters
    ----------
    device : str
        A device of torch.
    threads : int
        CPU threads of one client.
    inputs, outputs : int
        Size of the layer's weight.
    """

    device: str
    threads: int
    inputs: int
    outputs: int

    @classmethod
    def of(cls, model: nn.Module, device: torch.device, threads: int) -> Product:
        """Take the size that most of a model's frozen weights in linear layers have.

        Parameters
        ----------
        model : nn.Module
            The model with its adapters. Its weights may have no values.
        device : torch.device
            Where the run's clients train.
        threads : int
            CPU threads of one client.
        """
        sizes: Counter[tuple[int, int]] = Counter()
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and not layer.weight.requires_grad:
                size = layer.in_features, layer.out_features
                sizes[size] += math.prod(size)
        inputs, outputs = sizes.most_common(1)[0][0] if sizes else _USUAL
        return cls(str(device), threads, min(inputs, _LARGEST), min(outputs, _LARGEST))

    @property
    def file(self) -> Path:
        """Where the measurement is kept: one file for each machine, torch version and product."""
        digest = hashlib.sha256(json.dumps(self._key()).encode()).hexdigest()[:32]
        return cache_folder() / "precision" / f"{digest}.json"

    def _key(self) -> dict[str, object]:
        device = torch.device(self.device)
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        # Two GPUs of one kind are equally fast.
        place = {"processor": processor(), "torch": torch.__version__, "gpu": gpu}
        return {**asdict(self), **place, "device": device.type}


Measure: TypeAlias = Callable[[Product], Speeds]


def measure(product: Product) -> Speeds:
    """Measure one frozen layer, forward and backward to its input, as a run computes it.

    The two precisions take turns, so that other work on the machine slows both. The fastest turn of
    each counts, since other work makes no turn faster.

    Parameters
    ----------
    product : Product
        What is measured. It takes a fraction of a second.

    Raises
    ------
    ModelFailed
        The device cannot multiply in bf16.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(product.threads)
    try:
        with explained("Measuring products in bf16", "Set precision to fp32."):
            works = [_work(product, half=half) for half in (False, True)]
            turns = [[_seconds(work) for work in works] for _ in range(_WARM + _TURNS)]
    finally:
        torch.set_num_threads(threads)
    fp32, bf16 = (min(times) for times in zip(*turns[_WARM:], strict=True))
    return Speeds(fp32, bf16)


def speeds_of(product: Product, measured: Measure = measure) -> Speeds:
    """Return the speeds of a product on this machine, measured at the first call and then kept.

    Parameters
    ----------
    product : Product
        What is measured.
    measured : callable
        Measures it where no whole file holds its speeds.
    """
    path = product.file
    try:
        return read_or_make(
            path,
            lambda: _read(path),
            lambda draft: _write(draft, measured(product)),
        )
    except FileTrouble as error:
        _LOGGER.warning("The measured speeds are not kept: %s", error)
        return measured(product)


def _read(path: Path) -> Speeds | None:
    with suppress(OSError, ValueError):
        match json.loads(path.read_bytes()):
            case {"fp32": float(fp32), "bf16": float(bf16)} if all(
                0 < seconds < math.inf for seconds in (fp32, bf16)
            ):
                return Speeds(fp32, bf16)
    return None


def _write(draft: Path, speeds: Speeds) -> None:
    draft.write_text(to_json(asdict(speeds)), encoding="utf-8")


def _work(product: Product, *, half: bool) -> Callable[[], object]:
    # Constant values: the measurement must not move the stream of torch's random numbers.
    bare = nn.Linear(product.inputs, product.outputs, bias=False, device="meta")
    layer = bare.to_empty(device=product.device)
    nn.init.constant_(layer.weight.requires_grad_(False), 0.01)
    if half:
        run_in_bf16(layer)
    x = torch.full((_ROWS, product.inputs), 0.5, device=product.device, requires_grad=True)
    back = torch.ones(_ROWS, product.outputs, device=product.device)

    def work() -> None:
        torch.autograd.grad(layer(x), x, back)
        if back.is_cuda:
            torch.cuda.synchronize(back.device)

    return work


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
