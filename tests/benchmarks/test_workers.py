from __future__ import annotations

from dataclasses import replace

from benchmarks.figures import Figure
from benchmarks.step import Shape
from benchmarks.tasks import ShapeTask
from benchmarks.workers import MEMORY_BAR, Setting, measure
from tests.benchmarks.support import small_roberta


class Small(ShapeTask):
    """A small RoBERTa with a large table of words."""

    def shape(self) -> Shape:
        from transformers import RobertaConfig, RobertaForSequenceClassification

        small = small_roberta()
        config = RobertaConfig(
            vocab_size=2_000_000, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=40,
        )  # fmt: skip
        return replace(small, build=lambda: RobertaForSequenceClassification(config))


def test_shared_weights_cost_a_worker_less_than_its_own() -> None:
    found: list[Figure] = []

    measure(Setting("tests.benchmarks.test_workers:Small"), found.append)

    (figure,) = found
    assert (figure.reference, figure.unit, figure.bar) == (MEMORY_BAR, "MB", 1.0)
    assert figure.ours is not None
    apart = float(figure.against.split("; ")[1].split(" MB")[0])
    # A table of 128 MB.
    assert apart - figure.ours > 100
