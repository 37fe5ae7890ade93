"""The code on a model card: from an adapter's folder and the base model to a prediction.

Whoever reads a card has neither the machine nor the data of the run. So the code names the base
model as the hub does, or leaves a place to fill in, and it opens no data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora_flwr.config import RunConfig
from fedlora_flwr.data.names import names
from fedlora_flwr.data.sources import is_hub_name

PLACE, PICTURE = "PATH/OF/", "PATH/OF/A/PICTURE.png"
"""Where the code begins a path, and names a picture, that its reader has to fill in."""
_AUTO = {
    "instruction-tuning": "AutoModelForCausalLM",
    "question-answering": "AutoModelForQuestionAnswering",
    "text-classification": "AutoModelForSequenceClassification",
}
_FILES = {"model": "base_model", "weights": "weights"}
# What a task's model depends on. The rest of a configuration says how it is trained, and an adapter
# on the parts of a fused layer is exported as one on the whole layer.
_OF_THE_MODEL = ("pooling", "max-length", "image-size")


@dataclass(frozen=True)
class CardCode:
    """The code that loads an adapter and prints a prediction.

    Parameters
    ----------
    config : RunConfig
        The run.
    base : nn.Module
        The base model, without adapters.
    classes : Sequence[str]
        Names of the classes in the order of their numbers; none if the task has no classes.
    """

    config: RunConfig
    base: Any
    classes: Sequence[str]

    def __str__(self) -> str:
        """Return the code: imports, what to fill in, the model, and a prediction."""
        by_transformers = (
            type(self.base).__module__.startswith("transformers.")
            and self.config.task in _AUTO
            and self.config.weights == "pretrained"
        )
        imports, load = self._by_transformers() if by_transformers else self._by_task()
        needs, predict = self._prediction()
        own = sorted(line for line in imports if "fedlora_flwr" in line)
        others = sorted({"import torch", "from peft import PeftModel", *needs, *imports} - {*own})
        others.sort(key=lambda line: line.startswith("from"))
        lines = [*others, *([""] if own else []), *own, ""]
        lines += ['folder = "."  # This folder, or the name of this repository on the hub.']
        lines += [f"{name} = {text}" for key, name in _FILES.items() if (text := self._file(key))]
        if self.classes:
            lines.append(f"classes = {list(self.classes)!r}")
        lines += ["", *load, "model = PeftModel.from_pretrained(base, folder).eval()"]
        return "\n".join([*lines, *([""] if predict else []), *predict, ""])

    def _file(self, key: str) -> str:
        """Return a file or model as code: a name that others have, or a place to fill in."""
        value = str(self.config.items()[key])
        if not value or value == RunConfig().items()[key]:
            return ""
        if is_hub_name(value) and not Path(value).expanduser().exists():
            return f'"{value}"'
        what = "base model" if key == "model" else "base model's weights"
        return f'"{PLACE}{Path(value).name}"  # The {what} on your machine.'

    def _by_transformers(self) -> tuple[list[str], list[str]]:
        auto, labels = _AUTO[self.config.task], ""
        if self.classes:
            labels = ", num_labels=len(classes)"
            # Models that classify the last token need the padding token to find it.
            labels += f", pad_token_id={self.base.config.pad_token_id}"
        return (
            [f"from transformers import {auto}, AutoTokenizer"],
            [f"base = {auto}.from_pretrained(base_model{labels})"],
        )

    def _by_task(self) -> tuple[list[str], list[str]]:
        keys = ", ".join(f"{name!r}: {text}" for name, text in self._keys().items())
        imports = [
            "from fedlora_flwr import RunConfig",
            "from fedlora_flwr.tasks.registry import build_task",
        ]
        if self.config.task == "text-classification":
            imports.append("from transformers import AutoTokenizer")
        return imports, [
            f"task = build_task({self.config.task!r}, RunConfig.of({{{keys}}}))",
            "base = task.build_model()",
        ]

    def _keys(self) -> dict[str, str]:
        """Return the keys by which the task builds the same model, as code."""
        values, defaults = self.config.items(), RunConfig().items()
        keys = {"task": repr(self.config.task)}
        keys.update({key: name for key, name in _FILES.items() if self._file(key)})
        chosen = [key for key in _OF_THE_MODEL if values[key] != defaults[key]]
        if self.config.weights == "random":  # Then the weights follow from the seed.
            chosen.append("seed")
        keys.update({key: repr(values[key]) for key in chosen})
        if self.classes and self.config.dataset:
            keys["num-classes"] = "len(classes)"
        if self.config.dataset:  # The task only needs a name: it opens no data to build a model.
            keys["dataset"] = repr("no data")
        return keys

    def _prediction(self) -> tuple[list[str], list[str]]:
        """Return imports and lines; none for a task of the user's own, whose inputs are its own."""
        made: dict[str, Callable[[], tuple[list[str], list[str]]]] = {
            "digits": self._digit,
            "image-classification": self._picture,
            "instruction-tuning": self._chat,
            "question-answering": self._question,
            "text-classification": self._text,
        }
        found = made.get(self.config.task)
        return found() if found else ([], [])

    def _text(self) -> tuple[list[str], list[str]]:
        pair = len(names(self.config.input_columns)) == 2
        given = '"A first text of yours.", "And a second."' if pair else '"A text of yours."'
        return [], [*self._tokenized(given, "truncation=True"), *_CLASS]

    def _question(self) -> tuple[list[str], list[str]]:
        return [], [
            'question, context = "Who wrote this?", "This was written by Ada."',
            *self._tokenized("question, context", 'truncation="only_second"'),
            "with torch.inference_mode():",
            "    found = model(**inputs)",
            "start, end = int(found.start_logits[0].argmax()), int(found.end_logits[0].argmax())",
            'print("Answer:", tokenizer.decode(inputs["input_ids"][0][start : end + 1]))',
        ]

    def _chat(self) -> tuple[list[str], list[str]]:
        return [], [
            "tokenizer = AutoTokenizer.from_pretrained(base_model)",
            'chat = [{"role": "user", "content": "A question of yours."}]',
            "options = {'add_generation_prompt': True, 'return_dict': True}",
            'inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", **options)',
            "with torch.inference_mode():",
            "    tokens = model.generate(**inputs, max_new_tokens=64)[0]",
            'answer = tokens[inputs["input_ids"].shape[1] :]',
            'print("Answer:", tokenizer.decode(answer, skip_special_tokens=True))',
        ]

    def _picture(self) -> tuple[list[str], list[str]]:
        return ["from PIL import Image"], [
            f'picture = Image.open("{PICTURE}")',
            "with torch.inference_mode():",
            "    scores = model(task.inputs([picture]))[0].softmax(-1)",
            *_PRINTED,
        ]

    def _digit(self) -> tuple[list[str], list[str]]:
        return ["from sklearn.datasets import load_digits"], [
            "image = torch.tensor(load_digits().images[0] / 16).float()  # 8 by 8 pixels, 0 to 1.",
            "with torch.inference_mode():",
            "    scores = model(image.view(1, 1, 8, 8))[0].softmax(-1)",
            *_PRINTED,
        ]

    def _tokenized(self, given: str, truncation: str) -> list[str]:
        options = f'{truncation}, max_length={self.config.max_length}, return_tensors="pt"'
        if getattr(self.base.config, "type_vocab_size", 0) <= 1:  # It reads no such input.
            options += ", return_token_type_ids=False"
        return [
            "tokenizer = AutoTokenizer.from_pretrained(base_model)",
            f"inputs = tokenizer({given}, {options})",
        ]


_PRINTED = ("best = int(scores.argmax())", 'print(f"{classes[best]}: {scores[best]:.0%}")')
_CLASS = (
    "with torch.inference_mode():",
    "    scores = model(**inputs).logits[0].softmax(-1)",
    *_PRINTED,
)
