"""Measures when a device's process is ready for a private step. Flower starts one per message."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ROOT, started
from benchmarks.figures import Figure

START_BAR = 1 / 2
WORDS = ("a", "fine", "film", "the", "plot", "was", "dull", "and", "long", "very", "lovely")


@dataclass(frozen=True)
class Setting:
    """The number of starts, the size of the BERT (MiniLM's) and the number of records."""

    starts: int = 5
    layers: int = 12
    width: int = 384
    words: int = 30_522
    records: int = 2_000


@dataclass(frozen=True)
class Start:
    """One start: seconds on the wall clock, CPU seconds per stage, and loaded packages."""

    seconds: float
    stages: dict[str, float]
    packages: list[str]


def measure(setting: Setting, on_figure: Callable[[Figure], None]) -> None:
    """Compare a device's process with a plain script's."""
    with tempfile.TemporaryDirectory(prefix="fedlora-bench-") as scratch:
        found = take_starts(Path(scratch), setting)
    for figure in figures_of(found, setting):
        on_figure(figure)


def take_starts(folder: Path, setting: Setting) -> dict[str, list[Start]]:
    """Start each of `started.WAYS` in turns, after a device's first message has filled caches."""
    prepare(folder, setting)
    start("warm", folder)
    found: dict[str, list[Start]] = {way: [] for way in started.WAYS}
    for _ in range(setting.starts):
        for way, starts in found.items():
            starts.append(start(way, folder))
    return found


def figures_of(found: dict[str, list[Start]], setting: Setting) -> Iterator[Figure]:
    """Return the medians of the seconds until ready and of the CPU seconds."""
    plain = found["plain"]
    for way, which in (("client", "a device's first message"), ("warm", "its next, kept warm,")):
        ours = found[way]
        what = f"{which} to its first private step, BERT of {setting.layers} layers"
        yield Figure(
            f"from {what}",
            statistics.median(one.seconds for one in ours),
            statistics.median(one.seconds for one in plain),
            "s",
            "plain PEFT, Opacus, timm and transformers",
            START_BAR,
        )
        yield Figure(
            f"CPU time of {what}",
            statistics.median(sum(one.stages.values()) for one in ours),
            statistics.median(sum(one.stages.values()) for one in plain),
            "s",
            "the same",
            note=f"ours: {_split(ours)}; plain: {_split(plain)}",
        )


def prepare(folder: Path, setting: Setting) -> None:
    """Write a checkpoint with random weights, a device's file and records, and a run's settings."""
    from transformers import BertConfig, BertModel

    _write_tokenizer(folder / started.MODEL)
    BertModel(
        BertConfig(
            vocab_size=setting.words,
            hidden_size=setting.width,
            num_hidden_layers=setting.layers,
            num_attention_heads=setting.width // 32,
            intermediate_size=4 * setting.width,
        )
    ).save_pretrained(folder / started.MODEL)
    rows = [
        {"text": " ".join((WORDS * 3)[n % 11 : n % 11 + 4 + n % 17]), "label": n % 2}
        for n in range(setting.records)
    ]
    device = folder / started.DEVICE_FILE
    (device.parent / "data").mkdir(parents=True)
    (device.parent / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    device.write_text(
        'client-id = "device"\ntask = "text-classification"\nmodel = "../model"\nnum-classes = 2\n'
        'input-columns = "text"\ndataset = "data"\nepsilon = 3.0\ndelta = 1e-5\n'
        'state-dir = "state"\nkeep-warm = 60\ndevice = "cpu"\n'
    )
    (folder / started.RUN_FILE).write_text(
        f'task = "text-classification"\nmodel = "{folder / started.MODEL}"\ndataset = "none"\n'
        f'input-columns = "text"\nmax-length = 64\nbatch-size = {min(64, setting.records // 4)}\n'
        'num-rounds = 10\ndevice = "cpu"\n'
    )


def start(way: str, folder: Path) -> Start:
    """Start one of `started.WAYS` in a process of its own, and wait until it is ready.

    Raises
    ------
    RuntimeError
        The process ended before it was ready.
    """
    quiet = {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    begin = time.perf_counter()
    # Output goes to a file, because a process that is kept warm would hold a pipe open.
    with (
        (folder / f"{way}.log").open("w+") as log,
        subprocess.Popen(
            [sys.executable, "-m", started.__name__, way, str(folder)],
            cwd=ROOT,
            env={**os.environ, **quiet},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        line = process.stdout.readline() if process.stdout else ""
        seconds = time.perf_counter() - begin
    if not line:
        raise RuntimeError(f"{way}: {(folder / log.name).read_text()[-2000:]}")
    ready = json.loads(line)
    return Start(seconds, ready["stages"], ready["modules"])


def _split(starts: list[Start]) -> str:
    stages = starts[0].stages
    medians = {s: statistics.median(one.stages[s] for one in starts) for s in stages}
    return ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in medians.items())


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    numbers = {word: number for number, word in enumerate((*special, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
