"""A compiled backbone trains to what the plain one does, or says why it cannot be compiled."""

from __future__ import annotations

import numpy as np
import pytest
from torch._dynamo.utils import counters

from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.lora.compiled import compile_backbone
from fedlora_flwr.plan import BOTH, ComponentPlan
from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.privacy.mechanism import Mechanism
from tests.conftest import MakeConfig
from tests.models import FAMILIES


def test_a_compiled_backbone_trains_to_the_same_arrays(make_config: MakeConfig) -> None:
    counters.clear()
    trained = {}
    # As any other backend, without a compiler's minute.
    for backend in ("none", "aot_eager"):
        trainer = LocalTrainer.build(make_config(compile=backend, local_steps=1, reproducible=True))
        records = trainer.task.client_records(0, 3)
        mechanism = Mechanism(0.5, 1.0, 6, len(records))
        plan = ComponentPlan.uniform(BOTH)
        trained[backend] = trainer.train(trainer.start, plan, records, mechanism, ("client", 1))

    assert counters["stats"]["unique_graphs"] > 0
    for name, array in trained["none"].arrays.items():
        np.testing.assert_allclose(trained["aot_eager"].arrays[name], array, atol=1e-5)


def test_a_machine_that_cannot_compile_is_named_before_any_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    monkeypatch.setattr(config, "force_disable_caches", True)
    engine = PrivateEngine(FAMILIES[0].adapted(), FAMILIES[0].losses)
    with pytest.raises(InvalidValue, match=r"compile = 'inductor'.*'none': torch cannot compile"):
        compile_backbone(engine.adapted, "inductor")
