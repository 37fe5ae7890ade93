"""The adapter's model card: what the hub's own reader finds in it, and that its code runs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard as HubCard

from fedlora_flwr.cli.run_screen import next_steps
from fedlora_flwr.config import RunConfig
from fedlora_flwr.lora.build import build_adapted
from fedlora_flwr.places import STRATEGIES
from fedlora_flwr.server.card import ModelCard
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.strategies import strategy_class
from fedlora_flwr.tasks.registry import build_task
from tests.conftest import MakeConfig
from tests.server.support import run
from tests.tasks.texts import make_checkpoint, text_config, write_reviews

ROOT = Path(__file__).parents[2]


def card_of(run_dir: RunDirectory) -> HubCard:
    return HubCard.load(run_dir.adapter / "README.md")


def loaded_as_it_says(run_dir: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the card's own code in the adapter's folder; return the model."""
    (code,) = re.findall(r"```python\n(.*?)```", card_of(run_dir).text, re.DOTALL)
    monkeypatch.chdir(run_dir.adapter)
    found: dict[str, Any] = {}
    exec(code, found)
    return found["model"]


def check_against_the_run(
    config: RunConfig, run_dir: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> HubCard:
    card, summary = card_of(run_dir), run_dir.summary()
    assert summary is not None
    (result,) = card.data.eval_results
    assert result.metric_type == "accuracy"
    assert result.metric_value == round(summary["final_accuracy"], 4)
    assert f"| ε spent | {summary['epsilon_max']:.4g}, the largest of all clients |" in card.text
    assert f"| rounds | {config.num_rounds} of {config.num_rounds} |" in card.text
    assert "it has to be public.**" in card.text
    task = build_task(config.task, config)
    model = loaded_as_it_says(run_dir, monkeypatch)
    assert not model.training
    assert task.evaluate(model, task.test_records())["accuracy"] == summary["final_accuracy"]
    return card


def test_the_card_of_the_digits_run_is_the_hubs(
    finished: tuple[RunConfig, RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run_dir = finished
    card = check_against_the_run(config, run_dir, monkeypatch)
    found = card.data.to_dict()
    assert found["library_name"] == "peft"
    assert found["pipeline_tag"] == "image-classification"
    assert found["metrics"] == ["accuracy"]
    assert {"lora", "differential-privacy", config.strategy} <= set(found["tags"])
    assert found.keys().isdisjoint({"license", "base_model", "datasets"})
    assert card.data.eval_results[0].dataset_name == "the digits of scikit-learn"
    assert "**This is the result of a simulation, not a release.**" in card.text
    assert "| adjacency | zero-out: " in card.text
    assert "| trust model | `local`: " in card.text


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_a_text_model_is_loaded_by_the_cards_code(
    tmp_path: Path, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = text_config(
        make_checkpoint("bert", tmp_path / "backbone"), write_reviews(tmp_path / "films"),
        input_columns="text", pooling=pooling, num_rounds=1, local_steps=1, batch_size=8,
        delta=1e-3, state_dir=str(tmp_path / "state"),
    )  # fmt: skip
    run_dir, _ = run(config, tmp_path / "run")
    card = check_against_the_run(config, run_dir, monkeypatch)
    plain = "from transformers import AutoModelForSequenceClassification" in card.text
    assert plain is (pooling == "model")
    # A folder of this machine is not the name of a data set or a model for others.
    header = card.content.split("---")[1]
    assert str(tmp_path) not in header
    assert card.data.eval_results[0].dataset_name == "films"
    assert card.data.eval_results[0].dataset_split == "validation"


def test_models_that_stay_with_clients_have_no_result(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    run_dir, _ = run(make_config(strategy="fedsa-lora", num_rounds=1), tmp_path / "run")
    card = card_of(run_dir)
    assert card.data.eval_results is None
    assert "This folder holds the shared part, which was not evaluated alone." in card.text


def test_a_run_that_ends_early_says_so(make_config: MakeConfig, tmp_path: Path) -> None:
    def end(row: object) -> None:
        raise RuntimeError("The disk is full.")

    with pytest.raises(RuntimeError):
        run(make_config(), tmp_path / "run", on_round=end)
    text = card_of(RunDirectory(tmp_path / "run")).text
    assert "**The run did not end as planned**: this is the model of its last round." in text
    assert "| rounds | 0 of 2 |" in text


def test_a_card_says_what_was_promised_and_names_what_the_hub_has(
    finished: tuple[RunConfig, RunDirectory],
) -> None:
    config, run_dir = finished
    summary = run_dir.summary()
    assert summary is not None
    adapted = build_adapted(config, build_task(config.task, config))

    def card(**changes: Any) -> HubCard:
        changed = replace(config, **changes)
        return HubCard(str(ModelCard(changed, summary, adapted, False, 360)))

    unprotected = card(epsilon=float("inf"))
    assert "| promise | none: the run added no noise" in unprotected.text
    assert "ε spent" not in unprotected.text
    assert "differential-privacy" not in unprotected.data.tags
    named = card(model="owner/model", dataset="owner/data", test_split="test")
    assert (named.data.base_model, named.data.datasets) == ("owner/model", ["owner/data"])
    (result,) = named.data.eval_results
    assert (result.dataset_type, result.dataset_split) == ("owner/data", "test")
    assert "simulation" not in card(reproducible=False).text
    summed = card(trust_model="secure-sum", sample_rate=0.1, local_steps=1)
    assert "one training record of all clients together" in summed.text
    assert "all runs of a client" in card(ledger_scope="lifetime").text


def test_each_strategy_has_its_paper() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["references"]
    papers = {
        entry["abbreviation"].lower(): (entry["title"], entry["url"].rpartition("/")[2])
        for entry in cited
        if "abbreviation" in entry
    }
    found = {name: strategy_class(name).paper for name in STRATEGIES}
    assert found.pop("head-only") == ()
    assert found == {name: papers[name] for name in found}


def test_a_runs_last_lines_name_the_card_and_what_to_do_next(
    finished: tuple[RunConfig, RunDirectory],
) -> None:
    config, run_dir = finished
    lines = dict(next_steps(config, run_dir))
    assert lines["Adapter"] == f"{run_dir.adapter}, and its README.md says how to load it"
    assert lines["Next"] == f"fedlora plot {run_dir.path}"
    released = dict(next_steps(replace(config, reproducible=False), run_dir))
    assert released["Next"] == f"hf upload OWNER/NAME {run_dir.adapter}"
