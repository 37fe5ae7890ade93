from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.tasks.instruction_tuning import InstructionTuning
from tests.backbones import checkpoints
from tests.tasks.conversations import LAYERS, TEXTS, Make, chat, messy_rows
from tests.tasks.tiny_tasks import all_records

every_model = pytest.mark.parametrize("model", LAYERS)
pytestmark = pytest.mark.usefixtures("empty_cache")


def by_prefixes(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Return tokens and labels, found by the tokens of ever longer conversations."""

    def tokens(count: int, **options: bool) -> list[int]:
        part = messages[:count]
        if not part:
            return list(tokenizer("<s><|assistant|>", add_special_tokens=False)["input_ids"])
        found = tokenizer.apply_chat_template(part, return_dict=False, **options)
        return list(found)

    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    whole = tokens(answers[-1] + 1 if answers else len(messages))
    labels = [-100] * len(whole)
    for i in answers:
        before, through = tokens(i, add_generation_prompt=True), tokens(i + 1)
        assert whole[: len(through)] == through
        assert through[: len(before)] == before
        labels[len(before) : len(through)] = through[len(before) :]
    return whole, labels


@every_model
@pytest.mark.parametrize("limit", [9, 64, 200])
def test_answers_are_what_ever_longer_conversations_add(
    make_chats: Make, model: str, limit: int
) -> None:
    rows = messy_rows(40)
    task = make_chats(rows, model, max_length=limit)
    tokenizer = AutoTokenizer.from_pretrained(task._settings.model)

    for row, record in zip(rows, all_records(task), strict=True):
        tokens, labels = by_prefixes(tokenizer, row["messages"])
        assert record["input_ids"].tolist() == [tokens[:limit]]
        assert record["labels"].tolist() == [labels[:limit]]
        assert record["attention_mask"].tolist() == [[1] * len(tokens[:limit])]
        assert record["answer_tokens"] == sum(label != -100 for label in labels[:limit])


def test_an_answer_ends_with_what_the_template_ends_it_with(make_chats: Make) -> None:
    task = make_chats([chat(("user", "bali"), ("assistant", "yes"), ("user", "dona"))])
    tokenizer = AutoTokenizer.from_pretrained(task._settings.model)
    (record,) = all_records(task)

    learned = record["labels"][record["labels"] != -100]
    assert tokenizer.decode(learned) == "yes<|end|>\n"
    assert tokenizer.decode(record["input_ids"][0]).endswith("yes<|end|>\n")


def test_a_token_on_the_border_is_the_answer_s(make_chats: Make, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    folder = checkpoints.llama(tmp_path / "plain", ["assistant: bali"] * 9, template)
    task = make_chats([chat(("user", "bali"), ("assistant", "bali"))], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (record,) = all_records(task)

    learned = record["labels"][record["labels"] != -100]
    # The blank belongs to the prompt, and is one token with the word.
    assert tokenizer.decode(learned) == " bali\n"


@pytest.mark.parametrize("chosen", ["", "messages", "talk", "prompt,response", "q, a"])
@pytest.mark.parametrize("layout", ["json", "parquet"])
def test_every_layout_of_conversations_is_read(
    make_chats: Make, tmp_path: Path, chosen: str, layout: str
) -> None:
    rows = [
        chat(("user", "bali dona"), ("assistant", "yes")),
        chat(("user", "x"), ("assistant", "")),
    ]
    task = make_chats(rows)
    expected = all_records(task)
    names = [name.strip() for name in chosen.split(",")] if chosen else ["messages"]
    for row in rows:
        messages = row.pop("messages")
        if len(names) == 2:
            row.update(
                {name: m["content"] or None for name, m in zip(names, messages, strict=True)}
            )
        else:
            row[names[0]] = [
                {**message, "content": message["content"] or None, "name": None}
                for message in messages
            ]
            row.update({"prompt": "not", "response": "this"})
    checkpoints.write_split(tmp_path / "set", "train", rows)
    if layout == "parquet":
        (tmp_path / "set" / "train.jsonl").unlink()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set" / "train.parquet")

    config = RunConfig.of(task._settings.items(), {"input-columns": chosen})
    found = all_records(InstructionTuning(config))

    assert [{k: v.tolist() for k, v in record.items()} for record in found] == [
        {k: v.tolist() for k, v in record.items()} for record in expected
    ]


def test_a_template_that_adds_nothing_of_its_own(make_chats: Make, tmp_path: Path) -> None:
    bare = "{% for m in messages %}{{ m.content }}{% endfor %}"
    folder = checkpoints.llama(tmp_path / "bare", TEXTS, bare)
    rows = [chat(("user", ""), ("assistant", answer)) for answer in ("", "bali dona")]
    task = make_chats(rows, folder)

    first, second = all_records(task)

    assert first["input_ids"].tolist() == [[1]]
    assert first["labels"].tolist() == [[-100]]
    assert task.losses(task.build_model(), first) == 0
    # Nothing comes before the second's answer to predict its first token from.
    tokens = second["input_ids"][0].tolist()
    assert second["labels"].tolist() == [[-100, *tokens[1:]]]
    assert second["answer_tokens"] == len(tokens) - 1 > 0


CHANGING = "{{ messages | length }}" + checkpoints.CHAT_TEMPLATE


LAST_ONLY = (
    "{% for m in messages %}{{ m.role }}{{ m.content }}"
    "{% if loop.last and m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
)


REFUSING = "{{ raise_exception('Users come first.') }}"


@pytest.mark.parametrize(
    ("template", "turns", "allowed"),
    [
        (None, ["user", "assistant"], "tokenizer has a chat template"),
        (CHANGING, ["user", "assistant"], "1 messages before an answer"),
        (LAST_ONLY, ["assistant", "assistant"], "accepts these conversations (Cannot"),
        (REFUSING, ["user", "assistant"], "accepts these conversations (Users come first.)"),
    ],
)
def test_a_template_that_does_not_serve_is_named(
    make_chats: Make, tmp_path: Path, template: str | None, turns: list[str], allowed: str
) -> None:
    folder = checkpoints.llama(tmp_path / "other", TEXTS, template)
    task = make_chats([chat(*((role, "bali") for role in turns))], folder)

    with pytest.raises(InvalidValue) as caught:
        task.client_records(0, 1)

    assert (caught.value.key, caught.value.value) == ("model", str(folder))
    assert allowed in caught.value.allowed


def test_a_template_that_ends_only_the_last_answer_serves_single_answers(
    make_chats: Make, tmp_path: Path
) -> None:
    folder = checkpoints.llama(tmp_path / "last", TEXTS, LAST_ONLY)
    turns = [("user", "bali"), ("assistant", "yes")]
    assert all_records(make_chats([chat(*turns)], folder))[0]["answer_tokens"] > 1
    with pytest.raises(InvalidValue, match="only adds text"):
        make_chats([chat(*turns, *turns)], folder).client_records(0, 1)


def test_what_records_are_made_of_tells_them_apart(
    make_chats: Make, chat_models: dict[str, Path], tmp_path: Path, empty_cache: Path
) -> None:
    rows = messy_rows(8)
    expected = [record["input_ids"].tolist() for record in all_records(make_chats(rows))]
    short = all_records(make_chats(rows, max_length=9))
    assert max(record["input_ids"].shape[1] for record in short) == 9
    pairs = [{**row, "prompt": "bali", "response": "yes"} for row in rows]
    assert [record["input_ids"].tolist() for record in all_records(make_chats(pairs))] == expected
    (other, *_) = all_records(make_chats(pairs, input_columns="prompt,response"))
    assert other["input_ids"].tolist() not in expected
    changes = {
        "chat_template.jinja": ("<|end|>", "</s>"),
        "tokenizer_config.json": ('"bos_token": "<s>"', '"bos_token": "</s>"'),
    }
    for name, change in changes.items():
        folder = tmp_path / name
        shutil.copytree(chat_models["llama"], folder)
        text = (folder / name).read_text()
        assert change[0] in text
        (folder / name).write_text(text.replace(*change))
        found = all_records(make_chats(rows, folder))
        assert [record["input_ids"].tolist() for record in found] != expected
    made = len([*empty_cache.glob("fedlora/datasets/*.lock")])
    all_records(make_chats(rows))
    assert len([*empty_cache.glob("fedlora/datasets/*.lock")]) == made == 6
