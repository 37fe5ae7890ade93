"""A device without fp64, as Apple's GPUs are: its tensors keep their numbers on the CPU.

Torch treats it as it treats a real device. Tensors of two devices do not meet in one operation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_map

SMALL_GPU = "smallgpu"


class SmallTensor(torch.Tensor):
    """A tensor of the device."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls: type[SmallTensor], held: torch.Tensor) -> SmallTensor:
        if held.dtype == torch.float64:
            raise TypeError("The device has no fp64.")
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(SMALL_GPU, 0),
            dispatch_sizes_strides_policy="sizes",  # Some operations change a shape in place.
        )
        made.held = held
        return made

    def __init__(self, held: torch.Tensor) -> None: ...

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(operation, args, kwargs or {})


def _run(operation: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the numbers, and give the results to the device that torch would."""
    known: dict[int, SmallTensor] = {}
    devices = set()

    def out_of(value: Any) -> Any:
        if isinstance(value, SmallTensor):
            known[id(value.held)] = value
            devices.add(SMALL_GPU)
            return value.held
        if isinstance(value, torch.Tensor) and value.dim():
            devices.add("cpu")
        return value

    name = operation.__name__
    args_, kwargs_ = tree_map(out_of, args), tree_map(out_of, kwargs)
    device = kwargs.get("device")
    if device is not None:
        kwargs_["device"] = "cpu"
    if len(devices) > 1 and not name.startswith(("copy_", "_copy_from", "index")):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    result = operation(*args_, **kwargs_)
    here = torch.device(device).type == SMALL_GPU if device is not None else SMALL_GPU in devices

    def into(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not here:
            return value
        return known[id(value)] if id(value) in known else SmallTensor(value)

    return tree_map(into, result)


class _Module(backend_registration._DummyBackendModule):
    """What torch asks of a device besides its operations."""

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None: ...


_library = torch.library.Library("_", "IMPL")  # type: ignore[no-untyped-call]


def _fallback(operation: Any, *args: Any, **kwargs: Any) -> Any:
    return _run(operation, args, kwargs)


def set_up() -> None:
    """Add the device to torch, for the rest of this process."""
    backend_registration._setup_privateuseone_for_python_backend(SMALL_GPU, _Module())
    _library.fallback(_fallback, "PrivateUse1")  # type: ignore[no-untyped-call]
