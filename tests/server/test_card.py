"""The adapter's model card: what the hub's own reader finds in it, and that its code runs."""

from __future__ import annotations

import io
import re
import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard as HubCard
from PIL import Image
from timm.models import save_for_hf
from transformers import BertConfig

from fedlora_flwr.config import RunConfig
from fedlora_flwr.data.pictures import normalized
from fedlora_flwr.lora.adapters import AdaptedModel
from fedlora_flwr.lora.build import build_adapted
from fedlora_flwr.places import STRATEGIES
from fedlora_flwr.server.card import ModelCard
from fedlora_flwr.server.card_code import CardCode
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.strategies import strategy_class
from fedlora_flwr.tasks.registry import build_task, class_names
from tests.backbones import checkpoints
from tests.conftest import MakeConfig
from tests.data.pictures import image_config, write_pictures
from tests.server.support import run
from tests.tasks import conversations
from tests.tasks.texts import fill, make_checkpoint, text_config, write_reviews

ROOT = Path(__file__).parents[2]


def card_of(run_dir: RunDirectory) -> HubCard:
    return HubCard.load(run_dir.adapter / "README.md")


def used_as_it_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **places: Path
) -> tuple[dict[str, Any], str]:
    """Run the card's own code in the adapter's folder; return its names and what it prints.

    A reader fills in the places of files that no hub has, and nothing else.
    """
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    for name, path in places.items():
        code = re.sub(rf'^({name} = .*?)"PATH/OF/[^"]*"', rf'\1"{path}"', code, flags=re.MULTILINE)
    assert "PATH/OF" not in code
    monkeypatch.chdir(folder)
    found: dict[str, Any] = {}
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(code, found)
    return found, printed.getvalue()


def check_against_the_run(
    config: RunConfig, run_dir: RunDirectory, monkeypatch: pytest.MonkeyPatch, **places: Path
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
    found, printed = used_as_it_says(run_dir.adapter, monkeypatch, **places)
    model = found["model"]
    best = int(found["scores"].argmax())
    assert printed == f"{found['classes'][best]}: {found['scores'][best]:.0%}\n"
    assert not model.training
    assert task.evaluate(model, task.test_records())["accuracy"] == summary["final_accuracy"]
    return card


def test_the_card_of_the_digits_run_is_the_hubs(
    finished: tuple[RunConfig, RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run_dir = finished
    card = check_against_the_run(config, run_dir, monkeypatch)
    assert "| classes | 0 = 0, 1 = 1, " in card.text
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
        delta=1e-3, state_dir=str(tmp_path / "state"), class_names="bad,good",
    )  # fmt: skip
    run_dir, _ = run(config, tmp_path / "run")
    card = check_against_the_run(config, run_dir, monkeypatch, base_model=tmp_path / "backbone")
    assert "classes = ['bad', 'good']" in card.text
    plain = "from transformers import AutoModelForSequenceClassification" in card.text
    assert plain is (pooling == "model")
    needs = "peft transformers" if plain else "'fedlora-flwr[client,text]'"
    assert f"`pip install {needs}`" in card.text
    # A folder of this machine is not the name of a data set or a model for others.
    for file in run_dir.adapter.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
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
    told = card(reproducible=False).text
    assert "not a release" not in told
    assert "stayed with the clients" not in told
    assert (
        "This was a simulation: one process held the records of all 3 simulated clients. The "
        "promise is to whoever sees the adapter, and not to that process."
    ) in told
    assert "whoever sees the adapter" not in unprotected.text
    assert "**This adapter is not private. Do not publish it.**" in unprotected.text
    on_devices = ModelCard(config, {**summary, "simulated": False}, adapted, False, 360)
    assert "The training records stayed with the clients." in str(on_devices)
    assert "one process" not in str(on_devices)
    summed = card(trust_model="secure-sum", sample_rate=0.1, local_steps=1)
    assert "one training record of all clients together" in summed.text
    assert "weights in the clip" not in summed.text
    weighted = card(clip_weight_head=0.1)
    assert "| weights in the clip | A 1, B 1, head 0.1; divided out after the noise |" in (
        weighted.text
    )
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
    assert found.pop("ffa-seeds") == papers["ffa-lora"]
    assert found == {name: papers[name] for name in found}


def exported(config: RunConfig, summary: Any, folder: Path) -> tuple[Any, AdaptedModel]:
    """Write the adapter of a model with random adapters, and its card, as a run does."""
    task: Any = build_task(config.task, config)
    adapted = build_adapted(config, task)
    fill(adapted)
    adapted.export(folder)
    ModelCard(config, summary, adapted, False, 4, class_names(task)).write(folder)
    return task, adapted


@pytest.mark.parametrize("split_qkv", [False, True])
def test_a_stranger_classifies_a_picture_by_the_cards_code(
    split_qkv: bool,
    finished: tuple[RunConfig, RunDirectory],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    save_for_hf(timm.create_model("test_vit", num_classes=10, img_size=32), tmp_path / "vit")
    write_pictures(tmp_path / "set", train=3, valid=2)
    config = image_config(
        tmp_path / "set", model=str(tmp_path / "vit"), weights="pretrained", split_qkv=split_qkv
    )
    folder = tmp_path / "adapter"
    task, adapted = exported(config, finished[1].summary(), folder)
    (picture,) = list((tmp_path / "set" / "valid" / "bee").iterdir())[:1]
    shutil.rmtree(tmp_path / "set" / "train")
    places = {"base_model": tmp_path / "vit", "picture": picture}
    found, printed = used_as_it_says(folder, monkeypatch, **places)
    assert found["classes"] == ["ant", "bee", "cat"]
    adapted.model.eval()
    inputs = task.inputs([Image.open(picture)])
    assert torch.allclose(adapted.model(inputs)[0].softmax(-1), found["scores"], atol=1e-5)
    batch = task.test_records().batch(torch.arange(len(task.test_records())))
    ours = normalized(batch["image"], task._data)
    assert any(torch.equal(inputs[0], one) for one in ours)
    assert printed == f"{found['classes'][found['best']]}: {found['scores'].max():.0%}\n"


def test_a_stranger_asks_a_language_model_by_the_cards_code(
    finished: tuple[RunConfig, RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoints.llama(tmp_path / "llama", conversations.TEXTS)
    config = text_config(model, tmp_path / "gone", task="instruction-tuning")
    _, adapted = exported(config, finished[1].summary(), tmp_path / "adapter")
    found, printed = used_as_it_says(tmp_path / "adapter", monkeypatch, base_model=model)
    adapted.model.eval()
    ours = adapted.model.generate(**found["inputs"], max_new_tokens=64)[0]
    assert torch.equal(ours, found["tokens"])
    assert printed.startswith("Answer: ")


def test_a_stranger_asks_about_a_text_by_the_cards_code(
    finished: tuple[RunConfig, RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_checkpoint("bert", tmp_path / "bert")
    config = text_config(model, tmp_path / "gone", task="question-answering")
    _, adapted = exported(config, finished[1].summary(), tmp_path / "adapter")
    found, printed = used_as_it_says(tmp_path / "adapter", monkeypatch, base_model=model)
    adapted.model.eval()
    with torch.inference_mode():
        ours = adapted.model(**found["inputs"])
    assert torch.allclose(ours.start_logits, found["found"].start_logits, atol=1e-5)
    assert printed.startswith("Answer: ")


def test_the_code_names_what_the_hub_has_and_reads_pairs(
    finished: tuple[RunConfig, RunDirectory], tmp_path: Path
) -> None:
    config, _ = finished
    base = build_adapted(config, build_task(config.task, config)).model.get_base_model()
    config = text_config("owner/model", tmp_path, input_columns="premise,hypothesis")
    base.config = BertConfig(type_vocab_size=2)
    code = str(CardCode(config, base, ["no", "yes"]))
    assert 'base_model = "owner/model"\n' in code
    assert 'tokenizer("A first text of yours.", "And a second.", truncation=True' in code
    own = str(CardCode(replace(config, task="mine.task:Mine"), base, []))
    assert own.endswith("model = PeftModel.from_pretrained(base, folder).eval()\n")
