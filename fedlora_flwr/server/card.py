"""The model card of a run's adapter, ``adapter/README.md``, in the format of the Hugging Face hub.

A card repeats facts from the run's own files. It has no license and no description of private
records, because the server knows neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.unit import counted, protected
from fedlora_flwr.data.sources import is_hub_name
from fedlora_flwr.files import replace_file
from fedlora_flwr.plan import PARTS
from fedlora_flwr.privacy.clip_weights import EVEN, ClipWeights
from fedlora_flwr.report.promise import NOT_PRIVATE, simulated
from fedlora_flwr.server.card_code import CardCode
from fedlora_flwr.strategies import strategy_class
from fedlora_flwr.tasks.registry import extras_of

if TYPE_CHECKING:
    from fedlora_flwr.lora.adapters import AdaptedModel

NAME = "README.md"
_DIGITS = "the digits of scikit-learn"
_HUB_TASKS = {
    "digits": "image-classification",
    "image-classification": "image-classification",
    "instruction-tuning": "text-generation",
    "question-answering": "question-answering",
    "text-classification": "text-classification",
}


@dataclass(frozen=True)
class ModelCard:
    """The model card of an adapter.

    Parameters
    ----------
    config : RunConfig
        The run.
    summary : Mapping[str, Any]
        Its ``summary.json``.
    adapted : AdaptedModel
        The model whose adapter it is.
    personal : bool
        Whether a part of each model stays with its client.
    test_records : int
        Public records that the server measured on.
    classes : Sequence[str] (default: ())
        Names of the classes in the order of their numbers; none if the task has no classes.
    best : bool (default: False)
        Whether it is the adapter of the best round, and not that of the last.
    """

    config: RunConfig
    summary: Mapping[str, Any]
    adapted: AdaptedModel
    personal: bool
    test_records: int
    classes: Sequence[str] = ()
    best: bool = False

    def of_best(self) -> ModelCard:
        """Return the card of the best round's adapter."""
        return replace(self, best=True)

    def write(self, folder: Path) -> None:
        """Write the card into an adapter's folder.

        Parameters
        ----------
        folder : Path
            The adapter's folder.
        """
        replace_file(folder / NAME, str(self).encode())

    def __str__(self) -> str:
        """Return the card, as the hub reads it."""
        base: Any = self.adapted.model.get_base_model()
        code = str(CardCode(self.config, base, self.classes))
        parts = [
            f"---\n{self._metadata()}\n---\n",
            f"# {self._name}\n",
            self._about(),
            f"## Privacy\n\n{_table(self._privacy())}\n",
            f"## Training\n\n{_table(self._training())}\n",
            f"## Evaluation\n\n{self._evaluation()}",
            f"## How to use it\n\n{self._install(code)}\n\n```python\n{code}```\n",
            f"## How to cite\n\n{self._citation()}",
        ]
        return "\n".join(parts)

    @property
    def _name(self) -> str:
        return f"LoRA adapter for {_last_part(self.config.task)}, by {self.config.strategy}"

    @property
    def _data(self) -> str:
        if self.config.dataset:
            return _last_part(self.config.dataset)
        return _DIGITS if self.config.task == "digits" else "the data of the task"

    @property
    def _after(self) -> float | None:
        """The task's metric after the round whose adapter this is; None if it was not measured."""
        metric = self.summary["metric"]
        last: float | None = self.summary[f"final_{metric}"]
        return self.summary["best"]["metrics"].get(metric) if self.best else last

    @property
    def _final(self) -> float | None:
        """The final metric of the model that is in the folder, if it was measured."""
        value = self._after
        return None if self.personal or value is None or not math.isfinite(value) else value

    def _metadata(self) -> str:
        from huggingface_hub import EvalResult, ModelCardData

        config, metric = self.config, str(self.summary["metric"])
        hub_task = _HUB_TASKS.get(config.task)
        on_hub = [config.dataset] if _on_hub(config.dataset) else None
        results = None
        if self._final is not None and hub_task:
            results = [
                EvalResult(
                    task_type=hub_task,
                    dataset_type=config.dataset if on_hub else "other",
                    dataset_name=self._data,
                    dataset_config=config.dataset_subset or None,
                    dataset_split=config.test_split if config.dataset else "test",
                    metric_type=metric,
                    metric_value=round(self._final, 4),
                )
            ]
        data = ModelCardData(
            base_model=config.model if _on_hub(config.model) else None,
            library_name="peft",
            pipeline_tag=hub_task,
            datasets=on_hub,
            metrics=[metric],
            tags=["lora", "federated-learning", "flower", "fedlora-flwr", config.strategy]
            + ["differential-privacy"] * config.private,
            eval_results=results,
            model_name=self._name if results else None,
        )
        return str(data.to_yaml())

    def _install(self, code: str) -> str:
        """Say what the card's code needs: a task of the package checks for all its extras."""
        extras = ",".join(extras_of(self.config.task))
        needs = f"'fedlora-flwr[{extras}]'" if "fedlora_flwr" in code else "peft transformers"
        return f"Run `pip install {needs}` first."

    def _about(self) -> str:
        summary, config = self.summary, self.config
        clients, is_simulated = summary["num_clients"], summary["simulated"]
        told = "The training records stayed with the clients."
        if is_simulated:
            told = simulated(clients, private=config.private)
        text = (
            f"This adapter was trained by {clients} {'simulated ' * is_simulated}"
            f"client{'s' * (clients != 1)} with [Flower](https://flower.ai) and fedlora-flwr "
            f"{summary['versions']['fedlora-flwr']}. {told} "
            "The records are not in this folder.\n"
        )
        if not config.private:
            text += f"\n**{NOT_PRIVATE}**\n"
        if self.best:
            text += (
                f"\n**This is the model of round {summary['best']['round']}, the best of all that "
                f"were measured** by `{summary['best']['chosen_by']}`. The model of the last round "
                "is not in this folder.\n"
            )
        elif summary["status"] != "completed":
            text += "\n**The run did not end as planned**: this is the model of its last round.\n"
        if config.reproducible and config.private:
            text += (
                "\n**This is the result of a simulation, not a release.** Its noise follows a seed "
                "that the configuration names, so anyone who knows the seed can remove the noise.\n"
            )
        return text

    def _privacy(self) -> Iterator[tuple[str, str]]:
        config, summary = self.config, self.summary
        if not config.private:
            yield "promise", "none: the run added no noise (`epsilon = inf`)"
            return
        yield "ε spent", f"{summary['epsilon_max']:.4g}, the largest of all clients"
        yield "ε allowed", f"{summary['epsilon_budget']:.4g}"
        yield "δ", f"{summary['delta']:.4g}"
        yield "unit", protected(config)
        zero = f"zero-out: the gradient of one {config.unit} is replaced by zero in every step"
        yield "adjacency", zero
        yield "accountant", summary["accountant"] or "none: no private step was taken"
        once = "one run; on a device whose own file says so, all its runs"
        yield "budget covers", once if config.ledger_scope == "run" else "all runs of a client"
        yield (
            "clip norm",
            f"{config.clip_norm:g}, over all trained tensors of a {config.unit} together",
        )
        weights = ClipWeights.configured(config)
        if weights != EVEN:
            parts = ", ".join(f"{part} {weights.of_part(part):g}" for part in PARTS)
            yield "weights in the clip", f"{parts}; divided out after the noise"
        local = "`local`: each client adds its own noise before anything leaves it"
        # The remark says whether the clients masked their uploads.
        summed = f"`secure-sum`, {summary['remarks'].get('secure sum', 'but no round was summed')}"
        yield "trust model", summed if config.secure_sum else local
        if summary["unprotected_metrics"]:
            yield "not protected", "losses on private records were reported without noise"

    def _training(self) -> Iterator[tuple[str, str]]:
        config, summary = self.config, self.summary
        number = strategy_class(config.strategy).paper[1:]
        paper = "".join(f" ([arXiv {n}](https://arxiv.org/abs/{n}))" for n in number)
        yield "strategy", f"`{config.strategy}`{paper}"
        yield (
            "backbone",
            f"`{_last_part(config.model or config.task)}`, fingerprint {self.adapted.fingerprint}",
        )
        yield "rank", f"{config.rank} (`lora-alpha = {config.lora_alpha:g}`)"
        yield "data set", self._data
        if self.classes:
            numbered = enumerate(self.classes)
            yield "classes", ", ".join(f"{number} = {name}" for number, name in numbered)
        yield "clients", str(summary["num_clients"])
        yield "rounds", f"{summary['rounds_done']} of {summary['num_rounds']}"
        steps = "one step by a secure sum" if config.secure_sum else f"{config.local_steps} steps"
        yield "in each round", steps
        if not config.secure_sum:
            size = counted(config.batch_size, config.unit)
            yield "expected batch", f"{size}, drawn by Poisson sampling"
        yield "weights of clients", f"`{summary['weighting']}`"
        yield "seed", str(summary["seed"])

    def _evaluation(self) -> str:
        metric = str(self.summary["metric"])
        begin, end = self.summary[f"initial_{metric}"], self._after
        if begin is None or end is None:
            return "This model was not evaluated.\n"
        figures = f"{metric.replace('_', ' ')} of {begin:.4f} before training and {end:.4f} after"
        if self.personal:
            return (
                f"A part of each model stays with its client. The clients' own models have a mean "
                f"{figures}. This folder holds the shared part, which was not evaluated alone.\n"
            )
        return (
            f"The server measured {figures} it, on {self.test_records:,} records of the split "
            f"`{self.config.test_split if self.config.dataset else 'test'}` of {self._data}. **The "
            "promise above does not cover the test set, so it has to be public.** One run has one "
            "seed, so this figure has no standard error.\n" + self._optimism()
        )

    def _optimism(self) -> str:
        if not self.best:
            return ""
        return (
            "\n**The round was chosen by the records that it is measured on, so this figure is "
            "optimistic.** Measure this model again on records that played no part in the choice.\n"
        )

    def _citation(self) -> str:
        version = self.summary["versions"]["fedlora-flwr"]
        paper = strategy_class(self.config.strategy).paper
        text = (
            "Cite the software"
            + (" and the paper of the strategy" if paper else "")
            + f":\n\n- The fedlora-flwr authors: fedlora-flwr, version {version}.\n"
        )
        if paper:
            text += f"- {paper[0]}. arXiv:{paper[1]}.\n"
        return text


def _on_hub(name: str) -> bool:
    """Tell whether a name is a hub name with an owner, and not a local folder."""
    return "/" in name and is_hub_name(name) and not Path(name).exists()


def _last_part(name: str) -> str:
    """Return a name without the folders of this machine."""
    return name if is_hub_name(name) else Path(name).name.rpartition(":")[2]


def _table(rows: Sequence[tuple[str, str]] | Iterator[tuple[str, str]]) -> str:
    lines = [f"| {name} | {text.replace('|', chr(92) + '|')} |" for name, text in rows]
    return "\n".join(["| | |", "|---|---|", *lines])
