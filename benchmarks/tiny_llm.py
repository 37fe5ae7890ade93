"""The LLM benchmark in small, without a network: ``python -m benchmarks.tiny_llm FOLDER``.

A tiny LLaMA learns this repository's README, changelog and contributing guide, which are public.
The pages of docs/ are the private records: each page is a source, and each source a client. A
conversation asks for the second half of a sentence. `FOLDER/recipe.toml` is the recipe
``llm-benchmark`` with these files, fewer rounds and smaller batches.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fedlora_flwr.config.recipes import load_recipe

ROOT = Path(__file__).parent.parent
PUBLIC = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
SOURCES = ("deployment", "methods", "privacy", "tasks")
SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>"
    "{{ message.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
OVERRIDES = (
    *("dataset-subset=", "test-split=validation", "train-limit=0", "test-limit=0"),
    *("max-length=128", "num-clients=4", "min-records=32", "num-rounds=4", "rank=8"),
    *("lora-alpha=16", "local-steps=5", "batch-size=24", "microbatch-size=0", "lr-a=0.01"),
    *("lr-b=0.01", "delta=0.001", "precision=fp32", "eval-every=4", "eval-batch-size=64"),
    *(f"{strategy}.eta=0.02" for strategy in ("fedadagrad", "fedadam", "fedyogi")),
)
"""Values of the tiny run that replace those of the recipe."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write model, data and recipe to the named folder, and print the next commands."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tiny_llm", description="Write model, data and recipe."
    )
    parser.add_argument("folder", type=Path, help="where to write them; made if missing")
    recipe = make(parser.parse_args(arguments).folder)
    print(f"Written: {recipe}. docs/llm_benchmark.md has the command that compares with it.")


def make(folder: Path, steps: int = 300) -> Path:
    """Write a tiny model, conversations with a source, and the recipe that uses both.

    Parameters
    ----------
    folder : Path
        The folder to write to, which is made if missing.
    steps : int (default: 300)
        Steps of training on the public text.

    Returns
    -------
    Path
        The recipe.
    """
    folder = folder.resolve()
    train_model(folder / "model", [(ROOT / name).read_text("utf-8") for name in PUBLIC], steps)
    write_conversations(folder / "data", [ROOT / "docs" / f"{name}.md" for name in SOURCES])
    paths = (f"model={folder / 'model'}", f"dataset={folder / 'data'}")
    recipe = folder / "recipe.toml"
    recipe.write_text(load_recipe("llm-benchmark", [*paths, *OVERRIDES]).to_toml(), "utf-8")
    return recipe


def write_conversations(folder: Path, pages: Sequence[Path]) -> None:
    """Write each page's sentences as conversations, every fifth to the public split."""
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    known: set[str] = set()
    for page in pages:
        found = [text for text in sentences(page.read_text("utf-8")) if text not in known]
        known.update(found)
        for number, text in enumerate(found):
            row = {"source": page.stem, "messages": conversation(text)}
            splits["train" if number % 5 else "validation"].append(json.dumps(row))
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in splits.items():
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def sentences(page: str) -> list[str]:
    """Return the sentences of a Markdown page's prose, each once, of 6 to 40 words."""
    prose = [
        " ".join(line.strip() for line in block.splitlines())
        for block in re.split(r"\n\s*\n", re.sub(r"```.*?```", "", page, flags=re.S))
        if not re.match(r"\s*(#|\||<|    )", block)
    ]
    found = [part for block in prose for part in re.split(r"(?<=[.!?])\s+(?=[A-Z`])", block)]
    return list(dict.fromkeys(text for text in found if 6 <= len(text.split()) <= 40))


def conversation(sentence: str) -> list[dict[str, str]]:
    """Return a question for the second half of a sentence, and that half."""
    words = sentence.split()
    half = len(words) // 2
    return [
        {"role": "user", "content": "Continue: " + " ".join(words[:half])},
        {"role": "assistant", "content": " ".join(words[half:])},
    ]


def train_model(folder: Path, texts: Sequence[str], steps: int) -> None:
    """Train a tokenizer and a LLaMA of two layers on texts, and save both as one checkpoint."""
    tokenizer = make_tokenizer(texts)
    stream = torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make_model(len(tokenizer))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(steps):
            begins = torch.randint(len(stream) - 65, (16, 1))
            batch = stream[begins + torch.arange(65)]
            logits = model(input_ids=batch[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer(texts: Sequence[str]) -> Any:
    """Train a byte-level tokenizer of 600 tokens, with a chat template."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = TEMPLATE
    return made


def make_model(words: int, width: int = 64, keys: int = 2, length: int = 128) -> Any:
    """Return an untrained LLaMA with two layers and four heads.

    Parameters
    ----------
    words : int
        Tokens of the vocabulary.
    width : int (default: 64)
        Width of the layers; inside, they are twice as wide.
    keys : int (default: 2)
        Heads of keys and values.
    length : int (default: 128)
        Tokens of the longest text.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=keys,
            max_position_embeddings=length,
        )
    )


if __name__ == "__main__":
    main()
