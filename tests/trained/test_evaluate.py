"""`evaluate` and `predict`: an adapter on files and tables that are not those of its run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from typer.testing import CliRunner

from fedlora_flwr import Evaluation, evaluate, predict
from fedlora_flwr.cli import app
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.files import to_json
from tests.cli.documented import fields
from tests.data.pictures import image_config, write_pictures
from tests.tasks import questions
from tests.tasks.texts import make_checkpoint, reviews, text_config, write_reviews
from tests.trained.folders import exported


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any, Any]:
    """Return an adapter's folder, its base model, its task and its model."""
    root = tmp_path_factory.mktemp("texts")
    base = make_checkpoint("bert", root / "base")
    data = write_reviews(root / "films")
    config = text_config(base, data, input_columns="text", class_names="bad,good")
    task, adapted = exported(config, root / "adapter")
    # Both classes are predicted about as often.
    scores = task.scores(adapted.model, task.test_records())
    with torch.no_grad():
        adapted.parameters["classifier.bias"].sub_(scores.median(dim=0).values)
    adapted.export(root / "adapter")
    return root / "adapter", base, task, adapted


def table(count: int = 50, seed: int = 5) -> pd.DataFrame:
    return pd.DataFrame(reviews(count, seed)).assign(number=range(count))


def fedlora(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def said_by(task: Any, adapted: Any, frame: pd.DataFrame) -> list[int]:
    """Return the model's classes, one text after another, by the tokenizer itself."""
    tokenizer, found = task._tokenizer, []
    for text in frame["text"]:
        inputs = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            found.append(int(adapted.model(**inputs).logits.argmax()))
    return found


def test_figures_by_class_are_those_of_scikit_learn(
    texts: tuple[Path, Path, Any, Any], tmp_path: Path
) -> None:
    folder, base, task, adapted = texts
    frame = table(151, seed=6)
    frame.to_parquet(tmp_path / "new.parquet")
    said = said_by(task, adapted, frame)
    assert 0.1 < sum(said) / len(said) < 0.9

    found = evaluate(folder, tmp_path / "new.parquet", model=base, device="cpu")

    assert found.records == len(frame)
    assert found.classes == ("bad", "good")
    assert found.confusion.to_numpy().tolist() == confusion_matrix(frame["label"], said).tolist()
    assert found.metrics["accuracy"] == pytest.approx((frame["label"] == said).mean())
    figures = precision_recall_fscore_support(frame["label"], said, zero_division=float("nan"))
    named = zip(("precision", "recall", "f1", "records"), figures, strict=True)
    for name, values in named:
        assert found.by_class[name].tolist() == pytest.approx(values.tolist(), nan_ok=True)
    given = evaluate(folder, frame, model=base, device="cpu")
    assert given.counts == found.counts
    assert given.metrics == pytest.approx(found.metrics)


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl"])
def test_predictions_are_in_the_order_of_the_file(
    texts: tuple[Path, Path, Any, Any], tmp_path: Path, ending: str
) -> None:
    folder, base, task, adapted = texts
    frame = table(30).drop(columns="label")
    frame.to_csv(tmp_path / "new.csv", index=False)
    output = tmp_path / f"said{ending}"

    done = fedlora("predict", folder, tmp_path / "new.csv", "-o", output, "-c", f"model={base}")

    assert done.exit_code == 0, done.output
    read: dict[str, Any] = {".parquet": pd.read_parquet, ".csv": pd.read_csv}
    found = read[ending](output) if ending in read else pd.read_json(output, lines=True)
    assert found.columns.tolist() == ["text", "number", "prediction", "probability"]
    assert found["number"].tolist() == list(range(30))
    assert found["prediction"].tolist() == [
        ("bad", "good")[n] for n in said_by(task, adapted, frame)
    ]
    assert found["probability"].between(0.5, 1).all()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_command_prints_what_the_function_returns(
    texts: tuple[Path, Path, Any, Any], tmp_path: Path
) -> None:
    folder, base, *_ = texts
    table().to_csv(tmp_path / "new.csv", index=False)
    options = ("--data", tmp_path / "new.csv", "-c", f"model={base}", "-c", "device=cpu")
    done = fedlora("evaluate", folder, *options, "--json")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert set(printed) == fields("evaluate")
    found = evaluate(folder, tmp_path / "new.csv", model=base, device="cpu")
    assert printed == json.loads(to_json(found.as_json()))
    shown = fedlora("evaluate", folder, *options).stdout
    assert "class" in shown
    assert "precision" in shown
    assert f"{found.metrics['accuracy']:.4f}" in shown


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (lambda t: t.drop(columns="label"), {}, "label-column = 'label' cannot be used: expected"),
        (lambda t: t.rename(columns={"text": "words"}), {}, "input-columns = 'text' cannot be"),
        (lambda t: t.replace({"label": {1: 7}}), {}, "at least 8 names, as a record has class 7"),
        (
            lambda t: t.assign(label=t["label"].map({0: "bad", 1: "god"})),
            {},
            "column 'label' also holds ['god']",
        ),
        (lambda t: t, {"model": ""}, "model = '' cannot be used"),
        (lambda t: t.to_dict(), {}, "data = 'dict' cannot be used: expected a pandas DataFrame"),
        (lambda t: t, {"no_such_key": 1}, "configuration key = 'no-such-key' cannot be used"),
    ],
)
def test_what_does_not_fit_is_told(
    texts: tuple[Path, Path, Any, Any], change: Any, options: dict[str, Any], said: str
) -> None:
    folder, base, *_ = texts
    with pytest.raises(InvalidValue) as told:
        evaluate(folder, change(table()), **{"model": base, "device": "cpu", **options})
    assert said in str(told.value)


def test_files_and_folders_that_cannot_be_used_are_told_before_any_work(
    texts: tuple[Path, Path, Any, Any], tmp_path: Path
) -> None:
    folder, base, *_ = texts
    for call, said in (
        (lambda: evaluate(tmp_path, table()), "the folder of a run, of an adapter"),
        (lambda: evaluate(folder, tmp_path / "none.csv"), "data = "),
        (lambda: evaluate(folder, model=base), "data = None cannot be used"),
        (lambda: predict(folder, table(), tmp_path / "said.xlsx"), "endings ['.parquet'"),
        (lambda: predict(folder, table().assign(prediction=0), model=base), "Rename that column"),
    ):
        with pytest.raises(InvalidValue) as told:
            call()
        assert said in str(told.value)


def test_a_base_model_that_has_moved_is_asked_for(
    texts: tuple[Path, Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, *_ = texts
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    told = (
        "This adapter was trained on a folder, or a model, named base. Say where it is: `-c "
        "model=FOLDER`"
    )
    with pytest.raises(InvalidValue) as caught:
        evaluate(folder, table())
    assert told in str(caught.value)
    with pytest.raises(InvalidValue) as caught:
        evaluate(folder, table(), model="elsewhere")
    assert told not in str(caught.value)


def test_another_base_model_is_refused(texts: tuple[Path, Path, Any, Any], tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    folder, base, *_ = texts
    other = AutoModel.from_pretrained(base)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    other.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    with pytest.raises(InvalidValue, match="trained on other frozen weights"):
        evaluate(folder, table(), model=tmp_path)


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "pictures")
    task, adapted = exported(image_config(data), tmp_path / "adapter")
    found = evaluate(tmp_path / "adapter", data, test_split="valid")
    assert found.metrics == pytest.approx(task.evaluate(adapted.model, task.test_records()))
    assert found.classes == ("ant", "bee", "cat")
    said = predict(tmp_path / "adapter", data, test_split="valid")
    hits = (said["prediction"] == [found.classes[n] for n in said["label"]]).mean()
    assert hits == pytest.approx(found.metrics["accuracy"])
    with pytest.raises(InvalidValue, match="one of the folder's splits"):
        evaluate(tmp_path / "adapter", data)


def test_questions_are_answered_with_and_without_known_answers(tmp_path: Path) -> None:
    model = make_checkpoint("bert", tmp_path / "base")
    rows = questions.messy_rows(12)
    config = text_config(model, tmp_path, task="question-answering")
    file = tmp_path / "validation.jsonl"
    pd.DataFrame(rows).to_json(file, orient="records", lines=True)
    task, adapted = exported(config, tmp_path / "adapter")
    found = evaluate(tmp_path / "adapter", file, model=model)
    assert isinstance(found, Evaluation)
    assert found.metrics == pytest.approx(task.evaluate(adapted.model, task.test_records()))
    assert found.counts == []
    plain = [{"question": row["question"], "context": row["context"]} for row in rows]
    said = predict(tmp_path / "adapter", pd.DataFrame(plain), model=model)
    assert all(a in c for a, c in zip(said["answer"], said["context"], strict=True))
    with pytest.raises(InvalidValue, match="'context'"):
        predict(tmp_path / "adapter", pd.DataFrame({"question": ["who"]}), model=model)


def test_code_that_a_folder_names_does_not_run_unless_the_caller_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attacker is who made the folder: all its files, and a module where the command runs."""
    exported(RunConfig(device="cpu"), tmp_path / "adapter")
    (tmp_path / "evil.py").write_text("open('ran', 'w').close()\nfrom own import Task\n")
    (tmp_path / "own.py").write_text("from fedlora_flwr.tasks.digits import DigitsTask as Task\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for file, text in (
        ("adapter/fedlora.toml", '[task]\ntask = "evil:Task"\n'),
        ("config.toml", '[task]\ntask = "evil:Task"\n[federation]\nstrategy = "evil:Strategy"\n'),
        (
            "config.toml",
            '[task]\ntask = "digits"\n[federation]\nstrategy = "evil:One"\n[evil]\nshare = 1\n',
        ),
    ):
        (tmp_path / file).write_text(text)
        if "evil:Task" in text:
            with pytest.raises(InvalidValue, match="runs only if you name it, too: task = evil:T"):
                evaluate(tmp_path / "adapter")
        else:
            assert evaluate(tmp_path / "adapter").task == "digits"
        assert not (tmp_path / "ran").exists()
    assert evaluate(tmp_path / "adapter", task="own:Task").records == 360
    done = fedlora("evaluate", tmp_path / "adapter", "-c", "task=own:Task")
    assert "Records   360" in done.stdout
