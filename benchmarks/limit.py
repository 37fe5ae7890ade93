"""How far a private step is from the time that its matrix products alone take.

The products are those of plain PEFT's step on the same model: forward, gradients of activations
down to the first adapted layer, and gradients of the factors. Each is repeated alone, with its own
shapes, in the same process and with the same number of threads. Their sum is the limit: a step can
be faster only with fewer products or with faster ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product as pairs
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.figures import Call, Figure, profiled, take_turns
from benchmarks.step import ALL_LINEARS, PHASES, Shape, StepBench, plain_step
from fedlora_flwr.layout import factor_of
from fedlora_flwr.lora.precision import run_in_bf16

BARS = {torch.float32: 1 / 0.90, torch.bfloat16: 1 / 0.60}
"""Most that a step may take over its limit: .90 and .60 of the limit's speed."""
FASTER = 1 / 4
"""Most that a step in bf16 may take of one in fp32, for few layers of a text model."""
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_aten = torch.ops.aten
_FORWARD = _aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True)
class Product:
    """A batch of matrix products, (count, m, k) times (count, k, n).

    Parameters
    ----------
    count : int
        Matrices in the batch.
    m, k, n : int
        Sizes of the two factors.
    left, right : bool
        Whether a factor lies transposed in memory.
    """

    count: int
    m: int
    k: int
    n: int
    left: bool = False
    right: bool = False

    @property
    def flops(self) -> int:
        """Floating-point operations, an addition and a multiplication for each pair."""
        return 2 * self.count * self.m * self.k * self.n

    def call(self, dtype: torch.dtype) -> Call:
        """Return the product of fresh matrices."""
        x = _matrices(self.count, self.m, self.k, self.left, dtype)
        y = _matrices(self.count, self.k, self.n, self.right, dtype)
        if self.count == 1:
            return lambda: torch.mm(x[0], y[0])
        return lambda: torch.bmm(x, y)


def _matrices(count: int, rows: int, columns: int, swapped: bool, dtype: torch.dtype) -> Tensor:
    if swapped:
        return torch.randn(count, columns, rows).to(dtype).transpose(1, 2)
    return torch.randn(count, rows, columns).to(dtype)


def products(call: Call) -> Counter[Product]:
    """Return the matrix products of a call, and how often each is made."""
    recorder = _Recorder()
    with recorder:
        call()
    return recorder.found


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self.found: Counter[Product] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found.update(_made(func, args, result))
        return result


def _made(func: Any, args: Sequence[Any], result: Any) -> list[Product]:
    name = func.overloadpacket
    if name in (_aten.mm, _aten.bmm):
        return [_product(args[0], args[1])]
    if name in (_aten.addmm, _aten.addmm_, _aten.baddbmm):
        return [_product(args[1], args[2])]
    if name is _aten.convolution:  # Forward only: the first layer is frozen and needs no gradient.
        kernel, rows = args[1], result.numel() // result.shape[1]
        return [Product(1, rows, prod(kernel.shape[1:]), kernel.shape[0])]
    if func is _FORWARD:
        return _attention(args[0], args[1], once=1)
    if func is _BACKWARD:  # The scores again, and the gradients of all factors of both products.
        return _attention(args[1], args[2], once=2) + _attention(args[1], args[2], once=1)[:1]
    return []


def _product(x: Tensor, y: Tensor) -> Product:
    count = x.shape[0] if x.dim() == 3 else 1
    m, k, n = x.shape[-2], x.shape[-1], y.shape[-1]
    return Product(count, m, k, n, _is_swapped(x), _is_swapped(y))


def _is_swapped(x: Tensor) -> bool:
    return x.stride(-1) != 1 and x.stride(-2) == 1


def _attention(queries: Tensor, keys: Tensor, once: int) -> list[Product]:
    *_, length, width = queries.shape
    count = queries.numel() // (length * width)
    scores = Product(count, length, width, keys.shape[-2], right=True)
    mixed = Product(count, length, keys.shape[-2], width)
    return [scores, mixed] * once


def limit(found: Mapping[Product, int], dtype: torch.dtype, repetitions: int) -> float:
    """Return the seconds of all products, each the median over repetitions."""
    # One product after another: the matrices of all of them together take much memory.
    return sum(
        times * take_turns({"": product.call(dtype)}, repetitions)[""]
        for product, times in found.items()
    )


def flops(found: Mapping[Product, int]) -> int:
    """Return the floating-point operations of all products."""
    return sum(product.flops * times for product, times in found.items())


def measure(
    shapes: Sequence[Shape],
    records: int,
    repetitions: int,
    on_figure: Callable[[Figure], None],
    threads: Sequence[int] = (1,),
) -> None:
    """Compare steps with their limits in fp32 and bf16, on the CPU.

    Parameters
    ----------
    shapes : Sequence[Shape]
        Models.
    records : int
        Records in the batch, the same in every step.
    repetitions : int
        Number of turns over which medians are taken.
    on_figure : callable
        Called with each figure once it is measured.
    threads : Sequence[int] (default: (1,))
        Numbers of threads, one after the other for each model.
    """
    for shape, number in pairs(shapes, threads):
        torch.set_num_threads(number)
        on = "one thread" if number == 1 else f"{number} threads"
        for layers, targets in shape.targets.items():
            setting, seconds = f"{shape.name}, b = {records}, {layers}, {on}", {}
            bench = StepBench(shape, targets, records, torch.device("cpu"))
            needed = {
                phase: products(plain_step(bench.plain, phase, shape, bench.batch))
                for phase in PHASES
            }
            for dtype, name in NAMES.items():
                if dtype is torch.bfloat16:
                    run_in_bf16(bench.engine.adapted.model)
                for phase, figure in _steps(bench, needed, dtype, repetitions).items():
                    on_figure(replace(figure, what=f"{setting}, {phase}, {name}"))
                    seconds[phase, dtype] = figure.ours
                for figure in shares(bench):
                    on_figure(replace(figure, what=f"{setting}, AB, {name}: {figure.what}"))
            for phase in PHASES:
                fast, slow = seconds[phase, torch.bfloat16], seconds[phase, torch.float32]
                bar = FASTER if "RoBERTa" in shape.name and layers != ALL_LINEARS else None
                on_figure(Figure(f"{setting}, {phase}: bf16", fast, slow, "s", "fp32", bar))


def _steps(
    bench: StepBench,
    needed: Mapping[str, Counter[Product]],
    dtype: torch.dtype,
    repetitions: int,
) -> dict[str, Figure]:
    """Return our steps over their limits, by phase. Both are timed in the same minute."""
    arrays = list(bench.engine.adapted.parameters)
    figures = {}
    for phase, factors in PHASES.items():
        ours = bench.call([name for name in arrays if factor_of(name) in factors])
        with bench.engine.training():
            before = take_turns({"ours": ours}, repetitions)["ours"]
            floor = limit(needed[phase], dtype, repetitions)
            after = take_turns({"ours": ours}, repetitions)["ours"]
            made = flops(products(ours))
        seconds, needs = (before + after) / 2, flops(needed[phase])
        note = (
            f"{floor / seconds:.0%} of the limit's speed; {needs / floor / 1e9:.0f} GFLOP/s at the "
            f"limit; the step makes {made / needs:.3f} of the needed products"
        )
        figures[phase] = Figure("", seconds, floor, "s", "its products", BARS[dtype], note)
    return figures


KINDS = {
    "products": ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "mkldnn"),
    "attention": ("_scaled_dot_product", "_softmax"),
    "copies and casts": ("copy_", "_to_copy", "clone", "cat", "contiguous", "fill_", "zero_"),
    "noise": ("normal_", "random_"),
    "norms of layers": ("native_layer_norm",),
}


def shares(bench: StepBench) -> list[Figure]:
    """Return what a step's time goes to, by kind of operator, as shares of all operators' time."""
    call = bench.call()
    with bench.engine.training():
        call()
        profile = profiled(call)
    found: Counter[str] = Counter()
    for event in profile.key_averages():
        found[_kind(event.key)] += event.self_cpu_time_total
    total = sum(found.values())
    return [
        Figure(f"share of {kind}", spent / 1e6, total / 1e6, "s", "a profiled step")
        for kind, spent in found.most_common()
    ]


def _kind(name: str) -> str:
    plain = name.removeprefix("aten::").removeprefix("mkldnn::")
    for kind, starts in KINDS.items():
        if plain.startswith(starts):
            return kind
    return "elementwise and others" if name.startswith("aten::") else "Python and autograd"
