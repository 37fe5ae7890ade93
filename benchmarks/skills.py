"""An instruction task that two cores can repeat: ``python -m benchmarks.skills FOLDER``.

A small LLaMA learns four skills from public conversations: to copy words, to reverse them, and to
name the first or the last. Private conversations ask for the same in other words, such as "mirror"
for "reverse". The model has read these words in public beside each skill, so it knows nothing of
what they ask for. Each of four clients prefers one way to ask. `FOLDER/recipe.toml` fine-tunes the
model on their conversations, and counts exactly right answers to public ones.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.tiny_llm import SPECIAL, TEMPLATE, make_model
from fedlora_flwr.config import RunConfig

Words = list[str]
SKILLS: Mapping[str, Callable[[Words], Words]] = {
    "copy": lambda words: words,
    "reverse": lambda words: words[::-1],
    "first": lambda words: words[:1],
    "last": lambda words: words[-1:],
}
ASKED: Mapping[str, Words] = {
    "copy": ["echo", "repeat", "again", "say"],
    "reverse": ["mirror", "flip", "backwards", "turn"],
    "first": ["start", "head", "begin", "lead"],
    "last": ["end", "tail", "finish", "close"],
}
"""Other words for each skill: the k-th is what client k prefers."""
CLIENTS = 4
PREFERS = 0.7
"""How often a client asks in its own way. Else it asks in any."""
NOUNS = [first + vowel + last for first in "bdfgk" for vowel in "aeiou" for last in "lmn"]
RECORDS, PUBLIC = 4000, 400
"""Conversations of each client, and public ones for the evaluation."""
LENGTHS = range(3, 6)
SETTINGS: Mapping[str, Any] = {
    "task": "instruction-tuning", "max-length": 24, "test-split": "validation",
    "eval-batch-size": 200, "generation-limit": PUBLIC, "max-new-tokens": 8,
    "partitioner": "natural-id", "partition-column": "source", "min-records": 64,
    "strategy": "dp-lora", "num-clients": CLIENTS, "num-rounds": 15, "rank": 8,
    "lora-alpha": 16.0, "lora-targets": r".*\.(q|k|v|o|gate|up|down)_proj", "local-steps": 4,
    "batch-size": 256, "optimizer": "adamw", "lr-a": 0.03, "lr-b": 0.03, "epsilon": 3.0,
    "delta": 1e-4, "clip-norm": 1.0, "reproducible": True, "device": "cpu", "eval-every": 15,
    "metric-for-best-model": "exact_match", "seed": 42,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Write model, data and recipe to the named folder, and print the next command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.skills", description="Write model, data and recipe."
    )
    parser.add_argument("folder", type=Path, help="where to write them; made if missing")
    recipe = make(parser.parse_args(arguments).folder)
    print(f"Written: {recipe}. Next: fedlora simulate {recipe}")


def make(folder: Path, steps: int = 3000) -> Path:
    """Write a model that has the skills, conversations, and the recipe that uses both.

    Parameters
    ----------
    folder : Path
        The folder to write to, which is made if missing.
    steps : int (default: 3000)
        Steps of training on public conversations.

    Returns
    -------
    Path
        The recipe.
    """
    folder = folder.resolve()
    train_model(folder / "model", steps)
    draw = random.Random(1)
    rows = [row for client in range(CLIENTS) for row in conversations(draw, client, RECORDS)]
    write(folder / "data" / "train.jsonl", rows)
    write(folder / "data" / "validation.jsonl", conversations(draw, None, PUBLIC))
    recipe = folder / "recipe.toml"
    places = {"model": str(folder / "model"), "dataset": str(folder / "data")}
    recipe.write_text(RunConfig.of({**SETTINGS, **places}).to_toml(), "utf-8")
    return recipe


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as lines of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def conversations(draw: random.Random, client: int | None, count: int) -> list[dict[str, Any]]:
    """Return conversations of a client, or of nobody in particular."""
    rows = []
    for _ in range(count):
        skill = draw.choice(list(SKILLS))
        if client is not None and draw.random() < PREFERS:
            asked = ASKED[skill][client]
        else:
            asked = draw.choice(ASKED[skill])
        words = draw.sample(NOUNS, draw.choice(LENGTHS))
        said = {"user": [asked, *words], "assistant": SKILLS[skill](words)}
        messages = [{"role": role, "content": " ".join(text)} for role, text in said.items()]
        rows.append({"source": f"client-{client}", "messages": messages})
    return rows


def train_model(folder: Path, steps: int) -> None:
    """Train a LLaMA of two layers on public conversations, and save it with its tokenizer."""
    tokenizer, texts = make_tokenizer(), public(random.Random(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make_model(len(tokenizer), width=96, keys=4, length=32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in range(steps):
            batch = tokenizer(list(islice(texts, 64)), padding=True)
            tokens = torch.tensor(batch["input_ids"])
            answers = _answers(tokens, tokenizer)
            logits = model(input_ids=tokens[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), answers[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def public(draw: random.Random) -> Iterator[str]:
    """Yield public conversations: a skill by its name, behind a word that says nothing."""
    others = [word for asked in ASKED.values() for word in asked]
    while True:
        skill, words = draw.choice(list(SKILLS)), draw.sample(NOUNS, draw.choice(LENGTHS))
        said = " ".join([draw.choice(others), skill, *words])
        answer = " ".join(SKILLS[skill](words))
        yield f"<s> <|user|> {said} <|end|> <|assistant|> {answer} <|end|>"


def _answers(tokens: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """Return the tokens of the answers; what comes before or after them does not count."""
    begins = (tokens == tokenizer.convert_tokens_to_ids("<|assistant|>")).cumsum(1) > 0
    return torch.where(begins & (tokens != tokenizer.pad_token_id), tokens, -100)


def make_tokenizer() -> Any:
    """Return a tokenizer with a token for each word, and a chat template."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = [*SKILLS, *(word for asked in ASKED.values() for word in asked), *NOUNS]
    names = ["<pad>", "<unk>", *SPECIAL, *words]
    vocabulary = {name: place for place, name in enumerate(names)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>", pad_token="<pad>",
        unk_token="<unk>",
    )  # fmt: skip
    made.chat_template = TEMPLATE
    return made


if __name__ == "__main__":
    main()
