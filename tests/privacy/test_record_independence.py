"""Models that treat records together in training only, and honest ones with dropout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath, EvoNorm2dB0
from torch import Tensor, nn
from transformers.models.swin.modeling_swin import SwinDropPath

from fedlora_flwr.data.records import TensorRecords
from fedlora_flwr.errors import PrivacyViolation
from fedlora_flwr.lora.adapters import AdaptedModel, LoRASpec, attach
from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.noise import SeededNoise
from fedlora_flwr.privacy.stand_ins import stand_ins
from tests.models import FAMILIES, PLAIN_SGD, Family, active, engine_of

WIDTH = 8


class Pictures(nn.Module):
    """Classifies pictures of 4 x 4 pixels with ``middle`` between two adapted layers."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(1, WIDTH)
        self.middle = middle
        self.second = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x.permute(0, 2, 3, 1)))
        hidden = self.middle(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        scores: Tensor = self.head(torch.tanh(self.second(hidden)).mean(dim=(1, 2)))
        return scores


class OwnBatchNorm(nn.Module):
    """Batch normalization as many write it themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, WIDTH, 1, 1))
        self.mean: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x - self.mean
        mean = x.mean(dim=(0, 2, 3), keepdim=True)
        self.mean = 0.9 * self.mean + 0.1 * mean.detach()
        return x - mean


class OwnStatistics(nn.Module):
    """Keeps a mean of what it has seen, and uses it, without a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        out = x - self.mean
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean()
        return out


class BufferOnly(nn.Module):
    """Counts bright pixels in a buffer and does nothing with it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.add_(x.detach().sum())
        return x


class GhostBatchNorm(nn.Module):
    """Normalizes each half of the batch by statistics that no gradient flows through."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        parts = x.chunk(2)
        return torch.cat([part / part.detach().std(dim=(0, 2, 3), keepdim=True) for part in parts])


class Mixup(nn.Module):
    """Blends each record with another one."""

    def __init__(self, manifold: bool = False) -> None:
        super().__init__()
        self.manifold = manifold

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        share = float(np.random.beta(0.4, 0.4))  # noqa: NPY002 - as mixup does
        other = x[torch.randperm(len(x))]
        return share * x + (1 - share) * (other.detach() if self.manifold else other)


class BatchShuffle(nn.Module):
    """Shuffles the records and does not put them back."""

    def forward(self, x: Tensor) -> Tensor:
        return x[torch.randperm(len(x))] if self.training else x


class ByTheBatchSize(nn.Module):
    """Divides by the number of records."""

    def forward(self, x: Tensor) -> Tensor:
        return x / len(x) if self.training else x


class CapacityRouter(nn.Module):
    """Sends each pixel to one of two experts, of which each takes so many of a batch, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1).reshape(-1, WIDTH)
        chosen = self.gate(rows).argmax(dim=1)
        room = len(rows) // 2 if self.training else len(rows)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            taken = (chosen == number).nonzero().squeeze(1)[:room]
            out = out.index_add(0, taken, expert(rows[taken]))
        return out.view(len(x), 4, 4, WIDTH).permute(0, 3, 1, 2)


class DetachedContrast(nn.Module):
    """Subtracts a little of the batch's mean, without its gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return x - 0.05 * x.detach().mean(dim=0) if self.training else x


MIXING = [
    OwnBatchNorm,
    OwnStatistics,
    BufferOnly,
    GhostBatchNorm,
    Mixup,
    lambda: Mixup(manifold=True),
    BatchShuffle,
    ByTheBatchSize,
    CapacityRouter,
    lambda: EvoNorm2dB0(WIDTH),
    DetachedContrast,
]


class FunctionalDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.4, training=self.training)


class AttentionDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2).mT
        p = 0.4 if self.training else 0.0
        found = F.scaled_dot_product_attention(rows, rows, rows, None, p)
        return found.mT.reshape(x.shape)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(WIDTH, 2, dropout=0.4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2).mT
        found: Tensor = self.heads(rows, rows, rows, need_weights=False)[0]
        return found.mT.reshape(x.shape)


class OwnNoise(nn.Module):
    """Draws in a way that nothing can hold still."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        noise = torch.randint(0, 1000, x.shape) / 1000
        return x + 0.1 * noise


class Experts(CapacityRouter):
    """Routes without a limit."""

    def forward(self, x: Tensor) -> Tensor:
        training, self.training = self.training, False
        try:
            return super().forward(x)
        finally:
            self.training = training


HONEST = [
    nn.Identity,
    lambda: nn.Dropout(0.4),
    lambda: nn.Dropout2d(0.4),
    lambda: nn.AlphaDropout(0.4),
    lambda: DropPath(0.4),
    lambda: SwinDropPath(0.4),
    lambda: nn.BatchNorm2d(WIDTH),
    lambda: nn.GroupNorm(2, WIDTH),
    FunctionalDropout,
    AttentionDropout,
    Heads,
    OwnNoise,
    Experts,
]


def engine_with(middle: nn.Module) -> PrivateEngine:
    torch.manual_seed(0)
    spec = LoRASpec(2, 4.0, 0.1, "first|second", ("head",))
    return PrivateEngine(attach(Pictures(middle), spec, seed=0), losses)


def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")


def records(count: int = 6) -> TensorRecords:
    generator = torch.Generator().manual_seed(5)
    return TensorRecords(
        {
            "image": torch.rand(count, 1, 4, 4, generator=generator),
            "label": torch.arange(count) % 3,
        }
    )


def everything_of(adapted: AdaptedModel) -> dict[str, Tensor]:
    model = adapted.model
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("make", MIXING)
@pytest.mark.parametrize("off", [0.0, 0.3], ids=["at the start", "off the start"])
def test_a_model_that_mixes_records_in_training_is_refused_before_its_first_step(
    make: Any, off: float
) -> None:
    torch.manual_seed(1)
    engine = engine_with(make())
    with torch.no_grad():
        for p in engine.adapted.parameters.values():
            p.add_(off * torch.randn(p.shape))
    before = everything_of(engine.adapted)

    engine.start_round(Mechanism(1.0, 1.0, 2, 6), PLAIN_SGD, SeededNoise(0))
    with pytest.raises(PrivacyViolation):
        engine.step(records(), torch.arange(3), active(engine.adapted, "*"))

    after = everything_of(engine.adapted)
    assert [name for name in before if not torch.equal(after[name], before[name])] == []
    assert not any(module.training for module in engine.adapted.model.modules())


@pytest.mark.parametrize("make", HONEST)
def test_a_model_that_only_drops_is_let_through(make: Any) -> None:
    torch.manual_seed(1)
    engine = engine_with(make())
    before, state = everything_of(engine.adapted), torch.get_rng_state()
    numpy: Any = np.random.get_state()  # noqa: NPY002

    engine.verify(records())

    after = everything_of(engine.adapted)
    assert [name for name in before if not torch.equal(after[name], before[name])] == []
    assert torch.equal(torch.get_rng_state(), state)
    now: Any = np.random.get_state()  # noqa: NPY002
    assert np.array_equal(now[1], numpy[1])
    assert engine._verified


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_check_reads_no_private_value(family: Family) -> None:
    class Private(TensorRecords):
        def batch(self, indices: Tensor) -> dict[str, Tensor]:
            assert len(indices) == 0
            return super().batch(indices)

    private = Private(family.records(3).batch(torch.arange(3)))

    engine = engine_of(family)
    engine.verify(private)

    assert engine._verified


def test_what_stands_in_for_records_has_their_form() -> None:
    given = records()
    drawn = stand_ins(given, 5, 0).batch(torch.arange(5))

    for name, tensor in given.batch(torch.arange(5)).items():
        assert (drawn[name].shape, drawn[name].dtype) == (tensor.shape, tensor.dtype)


def test_a_buffer_that_changes_later_is_noticed_in_its_step() -> None:
    class Late(BufferOnly):
        armed = False

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.armed else x

    middle = Late()
    engine = engine_with(middle)
    engine.start_round(Mechanism(1.0, 1.0, 2, 6), PLAIN_SGD, SeededNoise(0))
    engine.step(records(), torch.arange(3), active(engine.adapted, "*"))
    middle.armed = True

    with pytest.raises(PrivacyViolation, match=r"'.*middle\.seen' changes in a training pass"):
        engine.step(records(), torch.arange(3), active(engine.adapted, "*"))


def test_fields_that_0_and_1_mean_nothing_in_are_checked_on_the_records_themselves() -> None:
    def far(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["image"]), batch["label"] - 7, reduction="none")

    given = records().batch(torch.arange(6))
    shifted = TensorRecords({**given, "label": given["label"] + 7})
    for middle, refused in ((nn.Identity(), False), (Mixup(), True)):
        engine = PrivateEngine(engine_with(middle).adapted, far)
        if refused:
            with pytest.raises(PrivacyViolation, match="other records"):
                engine.verify(shifted)
        else:
            engine.verify(shifted)
            assert engine._verified
