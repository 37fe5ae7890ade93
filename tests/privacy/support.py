"""What tests of the private step and of budgets share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from fedlora_flwr.privacy import budget
from fedlora_flwr.privacy.engine import PrivateEngine


def forget() -> None:
    """Drop what is kept in memory, so that the next call reads files or computes."""
    budget._spent.cache_clear()
    budget._calibrate.cache_clear()


def own_cache(factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep a module's budgets in a cache of its own, as the body of a fixture does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(factory.mktemp("cache")))
        forget()
        yield
    forget()


def frozen_state(engine: PrivateEngine, trained: Sequence[str]) -> dict[str, Tensor]:
    """Return a copy of every tensor of the model but the trained ones."""
    moving = {id(engine.adapted.parameters[name]) for name in trained}
    model = engine.adapted.model
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: t.detach().clone() for name, t in tensors if id(t) not in moving}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def adam_state(engine: PrivateEngine, name: str) -> Mapping[str, Tensor]:
    assert engine._optimizer is not None
    state: Mapping[str, Tensor] = engine._optimizer.state[engine.adapted.parameters[name]]
    return state
