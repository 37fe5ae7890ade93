"""Conversations are not packed: the gradient of a row is clipped, so a row is one record."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.tasks.conversations import LAYERS, Make, chat
from tests.tasks.tiny_tasks import WORDS

pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.mark.parametrize("model", LAYERS)
def test_no_two_records_share_a_row_and_a_long_one_is_cut(
    make_chats: Make, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Each record repeats a word that no other has. Short ones would fit into a row together.
    repeats = [1, 2, 1, 60, 3, 90, 1, 2]
    rows = [
        chat(("user", f"{word} " * count), ("assistant", word))
        for word, count in zip(WORDS, repeats, strict=False)
    ]
    task = make_chats(rows, model, max_length=50)
    tokenizer = AutoTokenizer.from_pretrained(task._settings.model)
    whole = [tokenizer.apply_chat_template(row["messages"], return_dict=False) for row in rows]
    shared = {token for ids in whole for token in ids} - {
        token
        for n, ids in enumerate(whole)
        for token in {*ids} - {t for m, other in enumerate(whole) if m != n for t in other}
    }

    with caplog.at_level(logging.WARNING):
        records = task.client_records(0, 1)

    assert len(records) == len(rows)
    batch = records.batch(torch.arange(len(rows)))
    assert all(len(values) == len(rows) for values in batch.values())
    for ids, row, mask in zip(whole, batch["input_ids"], batch["attention_mask"], strict=True):
        assert row[mask.bool()].tolist() == ids[:50]
        own = {*row[mask.bool()].tolist()} - shared
        assert own <= {*ids}
        assert own
    cut = sum(len(ids) > 50 for ids in whole)
    assert cut == 2
    assert f"{cut} of {len(rows)} private records are longer than max-length = 50 tokens" in (
        caplog.text
    )
    # One more record is one more row, also beside the cut ones.
    assert len(records.subset(np.array([3, 5])).batch(torch.tensor([0, 1]))["input_ids"]) == 2
    losses = task.losses(task.build_model(), batch)
    assert losses.shape == (len(rows),)
    assert [bool(loss == 0) for loss in losses] == [len(ids) > 50 for ids in whole]
