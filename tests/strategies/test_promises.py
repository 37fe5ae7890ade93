"""A server says once what its clients do not promise."""

from __future__ import annotations

import logging
import math

import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedlora_flwr import RoLoRA, RunConfig, strategy_of
from fedlora_flwr.errors import FederationAborted
from fedlora_flwr.simulations.local_grid import LocalGrid
from tests.strategies.tiny import Asked, Tiny, record_of, reply_of, start_arrays


def plain(asked: Asked) -> RecordDict:
    """Answer as a project's own client does, which knows of no ε."""
    return reply_of(asked.trained(), asked.partition, loss=0.5)


def told(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [text for record in caplog.records if words in (text := record.getMessage())]


@pytest.fixture(autouse=True)
def flowers_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)


def test_uploads_without_epsilon_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    Tiny(3, plain).run(RoLoRA(), num_rounds=3)
    (text,) = told(caplog, "reported no epsilon")
    assert text.startswith("partition-000000 and 2 more reported no epsilon: nothing says that")
    assert "docs/how_to/use_in_my_flower_project.md" in text


def test_clients_that_report_their_epsilon_are_not_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    Tiny(3).run(RoLoRA(), num_rounds=2)
    assert not told(caplog, "reported")


def test_a_projects_private_strategy_refuses_uploads_without_epsilon() -> None:
    """Flower may still run the client of an earlier folder, which is not private."""
    strategy = strategy_of(RunConfig(min_clients=2, local_steps=1))
    with pytest.raises(FederationAborted) as caught:
        Tiny(2, plain).run(strategy, num_rounds=1)
    assert "partition-000000: it reports no epsilon, so its code is not the private" in str(
        caught.value
    )
    assert "stop its process flower-superlink" in str(caught.value)


def test_a_projects_strategy_without_a_promise_takes_them() -> None:
    strategy = strategy_of(RunConfig(min_clients=2, epsilon=math.inf))
    Tiny(2, plain).run(strategy, num_rounds=1)
    assert len(strategy.last_round.uploads) == 2  # type: ignore[union-attr]


def measuring(app: ClientApp) -> ClientApp:
    """Let clients measure, as those of Flower's quickstart do."""

    @app.evaluate()  # type: ignore[untyped-decorator,unused-ignore]
    def evaluate(message: Message, context: Context) -> Message:
        figures = MetricRecord({"num-examples": 7, "eval_acc": 0.5, "eval_loss": 1.0})
        return Message(RecordDict({"metrics": figures}), reply_to=message)

    return app


def test_figures_that_clients_measure_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    app = measuring(Tiny(2).app())
    with LocalGrid(app, 2, {}).running() as grid:
        strategy = RoLoRA(fraction_evaluate=1.0)
        result = strategy.start(grid, record_of(start_arrays()), num_rounds=2)
    assert {*result.evaluate_metrics_clientapp[2]} == {"eval_acc", "eval_loss"}
    (text,) = told(caplog, "figures of their own")
    assert text.startswith("Clients reported figures of their own: eval_acc, eval_loss. No noise")
