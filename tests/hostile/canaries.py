"""Small data folders with a word planted in every place that can hold private text.

Each builder writes records and a model below a folder and returns what a device's file says about
them. No part of the word may be in anything that leaves the device.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from timm.models import save_for_hf

from tests.backbones import checkpoints
from tests.backbones.checkpoints import CHAT_TEMPLATE

CANARY = "zqvkxjwpfh"
TRAIN, TEST = f"train-{CANARY}", f"test-{CANARY}"
CLASSES = (f"{CANARY}-good", f"{CANARY}-bad")
PRIVATE, PUBLIC = 40, 12
_PART = 5
_NOTE = "{# " + CANARY + " #}"
_REFUSING = (
    "{% for message in messages %}{{ raise_exception('"
    + CANARY
    + " said ' + message.content) }}{% endfor %}"
)

Row = dict[str, Any]


class Planted(NamedTuple):
    """A data folder with the word in it.

    Parameters
    ----------
    settings : dict[str, Any]
        Keys and values for the device's file, without budget and identity.
    folder : Path
        Holds the data set and the model.
    canary : str
        The word.
    """

    settings: dict[str, Any]
    folder: Path
    canary: str


Builder = Callable[[Path], Planted]


def traces(text: str | bytes, canary: str = CANARY) -> list[str]:
    """Return the parts of a word, five letters each, that are in a text in any case."""
    shown = text if isinstance(text, str) else text.decode("latin-1")
    parts = [canary[start : start + _PART] for start in range(len(canary) - _PART + 1)]
    return [part for part in parts if part in shown.lower()]


def text_lines(folder: Path) -> Planted:
    """Write texts as JSON lines, with names of columns, nested keys and classes."""
    for split, rows in _splits(_review):
        checkpoints.write_split(_data(folder), split, rows)
    return _texts(folder)


def text_csv(folder: Path) -> Planted:
    """Write texts as CSV, classes in words."""
    for split, rows in _splits(_review):
        lines = [f"{row['text-' + CANARY]},{row['kind-' + CANARY]}" for row in rows]
        head = f"text-{CANARY},kind-{CANARY}"
        (_data(folder) / f"{split}.csv").write_text("\n".join([head, *lines]))
    return _texts(folder)


def text_numbers(folder: Path) -> Planted:
    """Write texts as JSON lines, classes as numbers, so that only their number is stated."""
    for split, rows in _splits(_review):
        numbered = [{**row, f"kind-{CANARY}": i % 2} for i, row in enumerate(rows)]
        checkpoints.write_split(_data(folder), split, numbered)
    return _texts(folder, **{"class-names": "", "num-classes": 2})


def text_parquet(folder: Path) -> Planted:
    """Write texts as parquet, with classes and notes in the metadata."""
    for split, rows in _splits(_review):
        _write_parquet(_data(folder) / f"{split}.parquet", _numbered(rows))
    return _texts(folder)


def text_saved(folder: Path) -> Planted:
    """Write texts as data sets that the library saved."""
    for split, rows in _splits(_review):
        _numbered(rows).save_to_disk(str(_data(folder) / split))
    return _texts(folder)


def pictures(folder: Path) -> Planted:
    """Write class folders of PNG and JPEG files with notes in them."""
    for split, numbers in ((TRAIN, range(PRIVATE)), (TEST, range(PRIVATE, PRIVATE + PUBLIC))):
        for number in numbers:
            place = _data(folder) / split / CLASSES[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            form = ("png", "jpeg")[number // 2 % 2]
            (place / f"{CANARY}-{number}.{form}").write_bytes(_picture(number, form))
    return _pictures(folder)


def picture_parquet(folder: Path) -> Planted:
    """Write a table of pictures with the names of their files."""
    for split, rows in _splits(_shot):
        _write_parquet(_data(folder) / f"{split}.parquet", _numbered(rows))
    settings = {"label-column": f"kind-{CANARY}", "input-columns": f"shot-{CANARY}"}
    return _pictures(folder, **settings)


def questions(folder: Path) -> Planted:
    """Write questions on texts, with titles and numbers."""
    for split, rows in _splits(_question):
        checkpoints.write_split(_data(folder), split, rows)
    return _language(folder, "question-answering", checkpoints.bert)


def chats(folder: Path) -> Planted:
    """Write conversations, with roles, for a model whose template names the word."""
    for split, rows in _splits(_chat):
        checkpoints.write_split(_data(folder), split, rows)
    return _language(folder, "instruction-tuning", _llama(CHAT_TEMPLATE + _NOTE))


def prompts(folder: Path) -> Planted:
    """Write prompts and responses in columns of their own names."""
    for split, rows in _splits(_prompt):
        checkpoints.write_split(_data(folder), split, rows)
    columns = f"asked-{CANARY},said-{CANARY}"
    model = _llama(CHAT_TEMPLATE)
    return _language(folder, "instruction-tuning", model, **{"input-columns": columns})


def late_answers(folder: Path) -> Planted:
    """Write prompts so long that no response begins within 48 tokens."""
    planted = prompts(folder)
    for split, rows in _splits(_prompt):
        long = [{**row, f"asked-{CANARY}": "which " * 90} for row in rows]
        checkpoints.write_split(_data(folder), split, long)
    return planted


def broken_csv(folder: Path) -> Planted:
    """Write a table that a parser complains about, with the line."""
    planted = text_csv(folder)
    with (_data(folder) / f"{TRAIN}.csv").open("a") as stream:
        stream.write(f'\n{CANARY},"{CANARY},{CANARY},{CANARY}\n{CANARY},{CANARY},{CANARY}')
    return planted


def broken_lines(folder: Path) -> Planted:
    """Write JSON lines of which one is none."""
    planted = text_lines(folder)
    with (_data(folder) / f"{TRAIN}.jsonl").open("a") as stream:
        stream.write(f'\n{{"{CANARY}": {CANARY}')
    return planted


def broken_picture(folder: Path) -> Planted:
    """Write a file that is no picture."""
    planted = pictures(folder)
    (_data(folder) / TRAIN / CLASSES[0] / f"{CANARY}.png").write_bytes(CANARY.encode())
    return planted


def unknown_class(folder: Path) -> Planted:
    """Write a record of a class that nobody has named."""
    planted = text_lines(folder)
    with (_data(folder) / f"{TRAIN}.jsonl").open("a") as stream:
        row = {**_review(0), f"kind-{CANARY}": f"{CANARY}-secret"}
        stream.write("\n" + json.dumps(row))
    return planted


def shared_record(folder: Path) -> Planted:
    """Write a private record into the test split as well."""
    planted = text_lines(folder)
    with (_data(folder) / f"{TEST}.jsonl").open("a") as stream:
        stream.write("\n" + json.dumps(_review(0)))
    return planted


def refusing_template(folder: Path) -> Planted:
    """Write conversations for a model whose template repeats them in an error."""
    for split, rows in _splits(_chat):
        checkpoints.write_split(_data(folder), split, rows)
    return _language(folder, "instruction-tuning", _llama(_REFUSING))


SOUND: dict[str, Builder] = {
    build.__name__: build
    for build in (
        text_lines,
        text_csv,
        text_numbers,
        text_parquet,
        text_saved,
        pictures,
        picture_parquet,
        questions,
        chats,
        prompts,
    )
}
"""Builders of data that a device can train and evaluate on."""

BROKEN: dict[str, Builder] = {
    build.__name__: build
    for build in (
        broken_csv,
        broken_lines,
        broken_picture,
        unknown_class,
        shared_record,
        refusing_template,
    )
}
"""Builders of data whose errors, as the tasks raise them, have the word in them."""


def _data(folder: Path) -> Path:
    place = folder / f"data-{CANARY}"
    place.mkdir(parents=True, exist_ok=True)
    return place


def _splits(make: Callable[[int], Row]) -> list[tuple[str, list[Row]]]:
    private = [make(number) for number in range(PRIVATE)]
    public = [make(number) for number in range(PRIVATE, PRIVATE + PUBLIC)]
    return [(TRAIN, private), (TEST, public)]


def _settings(task: str, folder: Path, model: Path, **changes: Any) -> Planted:
    settings = {
        "task": task,
        "model": str(model),
        "dataset": str(_data(folder)),
        "train-split": TRAIN,
        "test-split": TEST,
        **changes,
    }
    return Planted(settings, folder, CANARY)


def _texts(folder: Path, **changes: Any) -> Planted:
    model = checkpoints.bert(folder / f"model-{CANARY}", _WORDS)
    usual = {
        "input-columns": f"text-{CANARY}",
        "label-column": f"kind-{CANARY}",
        "class-names": ",".join(CLASSES),
    }
    return _settings("text-classification", folder, model, **{**usual, **changes})


def _pictures(folder: Path, **changes: Any) -> Planted:
    model = folder / f"model-{CANARY}"
    with torch.random.fork_rng():
        torch.manual_seed(5)
        built = timm.create_model("test_vit", img_size=32, num_classes=0)
    save_for_hf(built, str(model), model_args={"img_size": 32})
    names = {"class-names": ",".join(CLASSES)}
    return _settings("image-classification", folder, model, **names, **changes)


def _language(
    folder: Path, task: str, build: Callable[[Path, Sequence[str]], Path], **changes: Any
) -> Planted:
    return _settings(task, folder, build(folder / f"model-{CANARY}", _WORDS), **changes)


def _llama(template: str) -> Callable[[Path, Sequence[str]], Path]:
    return lambda folder, texts: checkpoints.llama(folder, texts, template)


_WORDS = [f"the film was {CANARY} good bad user assistant system one two three which"] * 3


def _review(number: int) -> Row:
    return {
        f"text-{CANARY}": f"the film {number} was {CANARY}",
        f"kind-{CANARY}": CLASSES[number % 2],
        f"more-{CANARY}": {f"key-{CANARY}": number},
    }


def _shot(number: int) -> Row:
    content = {"bytes": _picture(number, "png"), "path": f"{CANARY}-{number}.png"}
    return {f"shot-{CANARY}": content, f"kind-{CANARY}": CLASSES[number % 2]}


def _question(number: int) -> Row:
    context = f"one {number} two {CANARY} three"
    answers = {"text": [CANARY], "answer_start": [context.index(CANARY)]}
    return {
        "id": f"{CANARY}-{number}",
        "title": CANARY,
        "question": f"which {CANARY} {number}",
        "context": context,
        "answers": answers,
    }


def _chat(number: int) -> Row:
    turns = (
        (f"system-{CANARY}", f"one {CANARY}"),
        ("user", f"which {CANARY} {number}"),
        ("assistant", f"two {CANARY} {number}"),
    )
    said = [{"role": role, "content": text, f"id-{CANARY}": CANARY} for role, text in turns]
    return {"messages": said, f"topic-{CANARY}": CANARY}


def _prompt(number: int) -> Row:
    return {
        f"asked-{CANARY}": f"which {CANARY} {number}",
        f"said-{CANARY}": f"two {CANARY} {number}",
    }


def _numbered(rows: Sequence[Row]) -> datasets.Dataset:
    """Return rows whose class is a number that the column's type names."""
    kind = f"kind-{CANARY}"
    numbered = [{**row, kind: CLASSES.index(row[kind])} for row in rows]
    made = datasets.Dataset.from_list(numbered)
    features = made.features.copy()
    features[kind] = datasets.ClassLabel(names=list(CLASSES))
    if f"shot-{CANARY}" in features:
        features[f"shot-{CANARY}"] = datasets.Image()
    return made.cast(features)


def _write_parquet(path: Path, dataset: datasets.Dataset) -> None:
    table: pa.Table = dataset.data.table
    notes = {**table.schema.metadata, CANARY.encode(): CANARY.encode()}
    pq.write_table(table.replace_schema_metadata(notes), path)


def _picture(number: int, form: str) -> bytes:
    values = np.random.default_rng(number).integers(0, 255, (36, 36, 3), dtype=np.uint8)
    picture, stream = Image.fromarray(values), io.BytesIO()
    if form == "png":
        notes = PngInfo()
        notes.add_text(f"note-{CANARY}", CANARY)
        picture.save(stream, "PNG", pnginfo=notes)
    else:
        exif = Image.Exif()
        exif[0x010E] = CANARY  # The picture's description.
        picture.save(stream, "JPEG", exif=exif, comment=CANARY)
    return stream.getvalue()
