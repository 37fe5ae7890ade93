"""Compares a round of ours with one as public scripts for these papers run it, with equal maths.

Those scripts have in common that they load the model and make the privacy engine again for every
client and round. They tokenize texts when a record is read, and pad them to the longest allowed
length. The script here is written for this purpose and copies none of them.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.figures import Figure
from benchmarks.rounds import time_rounds
from fedlora_flwr.config import RunConfig
from fedlora_flwr.processes.workers import log_to_file
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import prepare_run

BAR = 1 / 5
WORDS = 5000
"""Words of the made-up language. Each is one token."""


@dataclass(frozen=True)
class Setting:
    """Size of the federation and of its model. The default model size is that of MiniLM-L6."""

    clients: int = 6
    records: int = 1000
    batch: int = 32
    steps: int = 5
    rounds: int = 5
    max_length: int = 128
    hidden: int = 384
    layers: int = 6
    heads: int = 12


def measure(setting: Setting, on_figure: Callable[[Figure], None]) -> None:
    """Time our rounds and the published way's clients in turns.

    A published round is its clients one after the other, so one client is timed after each of our
    rounds and multiplied by their number.
    """
    with tempfile.TemporaryDirectory(prefix="fedlora-bench-") as scratch:
        folder = Path(scratch)
        with _cache_in(folder / "cache"):
            _make(folder, setting)
            ours, theirs = _take_turns(folder, setting)
    on_figure(
        Figure(
            f"a round: {setting.clients} clients, b = {setting.batch}, K = {setting.steps}, texts "
            "as long as SST-2's",
            statistics.median(ours),
            setting.clients * statistics.median(theirs),
            "s",
            "the published way",
            BAR,
        )
    )


def _take_turns(folder: Path, setting: Setting) -> tuple[list[float], list[float]]:
    config = _config(folder, setting)
    log_to_file(folder / "flower.log")
    prepared = prepare_run(config)
    script = _Script(folder, setting, prepared.mechanisms[0].noise_multiplier, config.clip_norm)
    theirs: list[float] = []

    rounds = 0

    def published() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 1:  # Our first round, which imports and opens data, is not timed either.
            script.client(steps=1)
            return
        begin = time.perf_counter()
        script.client(setting.steps)
        theirs.append(time.perf_counter() - begin)

    ours = time_rounds(prepared, RunDirectory(folder / "run"), between=published)
    return ours, theirs


def _config(folder: Path, setting: Setting) -> RunConfig:
    return RunConfig.of(
        {
            "task": "text-classification",
            "model": str(folder / "model"),
            "dataset": str(folder / "data"),
            "input-columns": "sentence",
            "num-classes": 2,
            "max-length": setting.max_length,
            "partitioner": "iid",
            "num-clients": setting.clients,
            "num-rounds": setting.rounds + 1,
            "local-steps": setting.steps,
            "batch-size": setting.batch,
            "strategy": "dp-lora",
            "rank": 8,
            "lora-alpha": 16.0,
            "eval-every": setting.rounds + 1,
            "delta": 1e-5,
            "device": "cpu",
            "reproducible": True,
            "state-dir": str(folder / "state"),
        }
    )


class _Script:
    """One client as in the public scripts."""

    def __init__(self, folder: Path, setting: Setting, sigma: float, clip: float) -> None:
        self._folder, self._setting, self._sigma, self._clip = folder, setting, sigma, clip
        frame = pd.read_parquet(folder / "data" / "train.parquet").head(setting.records)
        self._texts, self._labels = frame["sentence"].tolist(), frame["label"].tolist()

    def client(self, steps: int) -> dict[str, Tensor]:
        """Load, wrap and train the model, and return the upload."""
        from opacus import PrivacyEngine
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        folder, setting = str(self._folder / "model"), self._setting
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        lora = LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=["query", "value"],
            modules_to_save=["classifier"],
        )
        model = get_peft_model(model, lora).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        texts = _Texts(
            self._texts, self._labels, AutoTokenizer.from_pretrained(folder), setting.max_length
        )
        private, optimizer, loader = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(trained, lr=0.1),
            data_loader=DataLoader(texts, batch_size=setting.batch),
            noise_multiplier=self._sigma,
            max_grad_norm=self._clip,
        )
        for _, batch in zip(range(steps), loader, strict=False):
            labels = batch.pop("labels")
            optimizer.zero_grad()
            F.cross_entropy(private(**batch).logits, labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


class _Texts(Dataset[dict[str, Tensor]]):
    def __init__(self, texts: list[str], labels: list[int], tokenizer: Any, longest: int) -> None:
        self._texts, self._labels = texts, labels
        self._tokenizer, self._longest = tokenizer, longest

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self._tokenizer(
            self._texts[index],
            padding="max_length",
            truncation=True,
            max_length=self._longest,
            return_tensors="pt",
        )
        inputs = {name: tensor[0] for name, tensor in tokens.items()}
        return {**inputs, "labels": torch.tensor(self._labels[index])}


def _make(folder: Path, setting: Setting) -> None:
    """Write texts as long as SST-2's, and a model with random weights that reads them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    rng = np.random.default_rng(0)
    words = np.array([f"w{i}" for i in range(WORDS)])
    for split, count in (("train", setting.clients * setting.records), ("validation", 32)):
        # Half of SST-2's texts have up to 7 words, and 99 % fewer than 36.
        lengths = np.clip(np.exp(rng.normal(np.log(7), 0.7, count)).round(), 1, 52).astype(int)
        texts = [" ".join(rng.choice(words, length)) for length in lengths]
        frame = pd.DataFrame({"sentence": texts, "label": rng.integers(0, 2, count)})
        (folder / "data").mkdir(exist_ok=True)
        frame.to_parquet(folder / "data" / f"{split}.parquet")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *words.tolist()])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=setting.hidden,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        intermediate_size=4 * setting.hidden,
    )
    BertForSequenceClassification(config).save_pretrained(folder / "model")


@contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """Keep prepared records out of the user's cache."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before
