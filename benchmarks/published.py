"""Compares a round of ours with one as public scripts for these papers run it, with equal maths.

Those scripts have in common that they load the model and make the privacy engine again for every
client and round. They tokenize texts when a record is read, and pad them to the longest allowed
length. Each round ends with an evaluation of the whole public test set. The script here imitates
them: it is written for this purpose and copies none of them. It is also timed with texts that are
padded only to the longest of their batch, so that the table tells what padding costs.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.figures import Figure, seconds_of
from benchmarks.rounds import time_rounds
from fedlora_flwr.config import RunConfig
from fedlora_flwr.processes.workers import log_to_file
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import prepare_run

SHIPPED, CUT = "the imitated script", "the same with its padding cut"
BARS = {SHIPPED: 1 / 10, CUT: 1 / 3}
PRECISIONS = ("fp32", "bf16")
WORDS = 5000
"""Words of the made-up language. Each is one token."""


@dataclass(frozen=True)
class Setting:
    """Size of the federation and of its model. The default model size is that of MiniLM-L6."""

    clients: int = 6
    records: int = 1000
    batch: int = 32
    steps: int = 5
    rounds: int = 3
    tested: int = 872
    max_length: int = 128
    hidden: int = 384
    layers: int = 6
    heads: int = 12


def measure(setting: Setting, on_figure: Callable[[Figure], None]) -> None:
    """Time our rounds and the script's clients in turns.

    A round of the script is its clients one after the other and an evaluation. So one client is
    timed after each of our rounds and multiplied by their number, and the evaluation is timed once.
    Our rounds in bf16 come last, since the script has no such rounds to take turns with.
    """
    with tempfile.TemporaryDirectory(prefix="fedlora-bench-") as scratch:
        folder = Path(scratch)
        with _cache_in(folder / "cache"):
            _make(folder, setting)
            log_to_file(folder / "flower.log")
            prepared = prepare_run(_config(folder, setting))
            sigma = prepared.mechanisms[0].noise_multiplier
            scripts = {
                way: _Script(folder, setting, sigma, prepared.config.clip_norm, way == CUT)
                for way in BARS
            }
            clients: dict[str, list[float]] = {way: [] for way in BARS}

            def one_client_of_each() -> None:
                for way, script in scripts.items():
                    clients[way].append(seconds_of(partial(script.client, setting.steps)))

            fp32 = time_rounds(prepared, RunDirectory(folder / "fp32"), one_client_of_each)
            prepared = prepare_run(_config(folder, setting, "bf16"))
            bf16 = time_rounds(prepared, RunDirectory(folder / "bf16"))
            theirs = {
                # The first client imports, and so does our first round: neither counts.
                way: setting.clients * statistics.median(clients[way][1:])
                + seconds_of(scripts[way].evaluate)
                for way in BARS
            }
    what = f"a round: {setting.clients} clients, b = {setting.batch}, K = {setting.steps}, texts "
    what += f"as long as SST-2's, {setting.tested} of them for the evaluation"
    for precision, ours in zip(PRECISIONS, (fp32, bf16), strict=True):
        for way, bar in BARS.items():
            about = (f"{what}; ours in {precision}", statistics.median(ours), theirs[way], "s", way)
            on_figure(Figure(*about, bar))


def _config(folder: Path, setting: Setting, precision: str = "fp32") -> RunConfig:
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
            "delta": 1e-5,
            "device": "cpu",
            "precision": precision,
            "reproducible": True,
            "state-dir": str(folder / "state" / precision),
        }
    )


class _Script:
    """One client as in the public scripts, and their evaluation."""

    def __init__(
        self, folder: Path, setting: Setting, sigma: float, clip: float, cut: bool
    ) -> None:
        self._folder, self._setting, self._sigma, self._clip = folder, setting, sigma, clip
        self._cut = cut

    def client(self, steps: int) -> dict[str, Tensor]:
        """Load, wrap and train the model, and return the upload."""
        from opacus import PrivacyEngine

        model = self._model().train()
        trained = [p for p in model.parameters() if p.requires_grad]
        private, optimizer, loader = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(trained, lr=0.1),
            data_loader=self._loader("train", self._setting.records),
            noise_multiplier=self._sigma,
            max_grad_norm=self._clip,
        )
        for _, batch in zip(range(steps), loader, strict=False):
            labels = batch.pop("labels")
            optimizer.zero_grad()
            F.cross_entropy(private(**batch).logits, labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def evaluate(self) -> float:
        """Load the model, and return its accuracy on the test set."""
        model, right = self._model().eval(), 0
        with torch.no_grad():
            for batch in self._loader("validation", self._setting.tested):
                labels = batch.pop("labels")
                right += int((model(**batch).logits.argmax(-1) == labels).sum())
        return right / self._setting.tested

    def _model(self) -> Any:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForSequenceClassification

        folder = str(self._folder / "model")
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        lora = LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=["query", "value"],
            modules_to_save=["classifier"],
        )
        return get_peft_model(model, lora)

    def _loader(self, split: str, records: int) -> DataLoader[dict[str, Tensor]]:
        from transformers import AutoTokenizer

        frame = pd.read_parquet(self._folder / "data" / f"{split}.parquet").head(records)
        tokenizer = AutoTokenizer.from_pretrained(str(self._folder / "model"))
        longest = self._setting.max_length
        texts = _Texts(frame["sentence"].tolist(), frame["label"].tolist(), tokenizer, longest)
        return DataLoader(
            texts, self._setting.batch, collate_fn=_without_padding if self._cut else None
        )


def _without_padding(records: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return a batch that is as long as its longest text."""
    batch = {name: torch.stack([record[name] for record in records]) for name in records[0]}
    longest = int(batch["attention_mask"].sum(1).max())
    return {name: x[:, :longest] if x.ndim > 1 else x for name, x in batch.items()}


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
    for split, count in (
        ("train", setting.clients * setting.records),
        ("validation", setting.tested),
    ):
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
