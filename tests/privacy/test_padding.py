"""Padding cannot carry one record's length into another's gradient, at any finite weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from fedlora_flwr.data.arrow_records import ArrowRecords, pad_collate
from fedlora_flwr.lora.adapters import LoRASpec, attach
from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.microbatches import PassPlan, passes
from fedlora_flwr.privacy.noise import SeededNoise
from tests.models import PLAIN_SGD

SHORT = [3, 5, 4, 6, 3, 7]
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
LIMIT = 40


def bert() -> tuple[Any, str]:
    config = BertConfig(
        intermediate_size=16,
        num_labels=3,
        max_position_embeddings=LIMIT,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SIZES,
    )
    return BertForSequenceClassification(config), r".*\.(query|value)"


def llama() -> tuple[Any, str]:
    config = LlamaConfig(
        intermediate_size=16, num_labels=3, max_position_embeddings=LIMIT, pad_token_id=0, **SIZES
    )
    return LlamaForSequenceClassification(config), r".*\.(q_proj|v_proj)"


def losses(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits, batch["label"], reduction="none")


def texts(lengths: list[int]) -> ArrowRecords:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 40, (n,), generator=generator).tolist() for n in lengths]
    table = {
        "input_ids": rows,
        "attention_mask": [[1] * n for n in lengths],
        "label": [i % 3 for i in range(len(lengths))],
    }
    return ArrowRecords(Dataset.from_dict(table), pad_collate({"input_ids": 0}, limit=LIMIT))


class ToTheLongest:
    """Records whose batches are padded to their longest, and that say nothing of it."""

    alike = True

    def __init__(self, records: ArrowRecords) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        return self._records.batch(indices)


def engine_at(build: Any, size: float) -> PrivateEngine:
    """Return an engine whose arrays are drawn with deviation ``size``, but its head."""
    torch.manual_seed(0)
    model, targets = build()
    head = next(name for name in ("classifier", "score") if hasattr(model, name))
    adapted = attach(model, LoRASpec(2, 4.0, 0.0, targets, (head,)), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapted.parameters.values():
            p.copy_(torch.randn(p.shape, generator=generator))
        for layer in adapted.layers:
            layer.A.mul_(size)
            layer.B.mul_(size)
    engine = PrivateEngine(adapted, losses)
    engine._verified = True
    return engine


def moved(engine: PrivateEngine, records: Any, indices: list[int], exact: bool) -> Tensor:
    """Return the clipped sum of a step, in units of the clip norm."""
    sums: list[Tensor] = []
    engine.start_round(Mechanism(0.0, 1.0, 4, 8), PLAIN_SGD, SeededNoise(0), exact=exact)
    optimizer = engine._optimizer
    assert optimizer is not None
    optimizer.attach_step_hook(lambda made: sums.extend(p.grad.flatten() for p in made.params))
    start = {name: p.detach().clone() for name, p in engine.adapted.parameters.items()}
    engine.step(records, torch.tensor(indices), list(start))
    with torch.no_grad():
        for name, p in engine.adapted.parameters.items():
            p.copy_(start[name])
    return 4 * torch.cat(sums).double()


def influence(engine: PrivateEngine, records: Any, exact: bool = False) -> float:
    """Return how far the last record moves the sum, others being the same."""
    *others, last = range(len(records))
    added = moved(engine, records, [*others, last], exact) - moved(engine, records, others, exact)
    return float(added.norm())


@pytest.mark.parametrize("build", [bert, llama])
@pytest.mark.parametrize("size", [0.1, 1.0, 1e3, 1e5, 1e8, 1e12, 1e15, 1e18])
@pytest.mark.parametrize("length", [6, 14, 30, LIMIT])
def test_in_exact_passes_a_record_moves_the_sum_by_at_most_c_at_any_weights(
    build: Any, size: float, length: int
) -> None:
    records = texts([*SHORT, 12, 13, 29, LIMIT, length])
    assert influence(engine_at(build, size), records, exact=True) <= 1 + 1e-5


@pytest.mark.parametrize("build", [bert, llama])
@pytest.mark.parametrize("exact", [True, False])
def test_at_ordinary_weights_all_passes_do(build: Any, exact: bool) -> None:
    records = texts([*SHORT, 30])
    found = influence(engine_at(build, 0.1), records, exact)
    assert 0.1 < found <= 1 + 1e-5


def test_padding_to_the_longest_would_carry_a_records_length_to_others() -> None:
    found = [
        influence(engine_at(build, size), ToTheLongest(texts([*SHORT, 30])))
        for build in (bert, llama)
        for size in (1e3, 1e5, 1e8, 1e12, 1e15, 1e18)
    ]
    assert max(found) > 2


@pytest.mark.parametrize("build", [bert, llama])
@pytest.mark.parametrize("size", [1.0, 1e3, 1e8])
def test_in_exact_passes_a_gradient_follows_from_its_record_bit_for_bit(
    build: Any, size: float
) -> None:
    engine, records = engine_at(build, size), texts([*SHORT, 30, 9, 12, 31])
    names = list(engine.adapted.parameters)
    found: dict[int, Tensor] = {}
    for indices in (list(range(10)), [6, 2, 0], [3], [4, 5, 1, 9, 8, 7]):
        for part in passes(records, torch.tensor(indices), PassPlan(4, exact=True)):
            engine._activate(names)
            engine._fill(part.batch, part.rows, names, slice(len(part.indices)))
            samples = [engine.adapted.parameters[name].grad_sample for name in names]  # type: ignore[attr-defined]
            rows = torch.cat([sample.flatten(1) for sample in samples], dim=1).nan_to_num()
            assert not rows[len(part.indices) :].any()
            for index, row in zip(part.indices.tolist(), rows, strict=False):
                assert torch.equal(found.setdefault(index, row), row)
    assert len(found) == 10


def test_the_same_shapes_keep_a_records_gradient_bit_for_bit() -> None:
    """Of two data sets that differ in one record of one width, all others' gradients are equal."""
    engine = engine_at(bert, 1.0)
    records, others = texts([*SHORT, 6]), texts([*SHORT, 5])
    names = list(engine.adapted.parameters)
    rows = []
    for given in (records, others):
        batch = given.padded(torch.arange(7), 16)
        engine._activate(names)
        engine._fill(batch, 7, names)
        samples = [engine.adapted.parameters[name].grad_sample for name in names]  # type: ignore[attr-defined]
        rows.append(torch.cat([sample.flatten(1) for sample in samples], dim=1))
    assert torch.equal(rows[0][:6], rows[1][:6])
    assert not torch.equal(rows[0][6], rows[1][6])
