"""``fedlora merge``: a plain model with an adapter's products in its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import nn

from fedlora_flwr.errors import InvalidValue, explained, require
from fedlora_flwr.files import private_folder, replacing
from fedlora_flwr.lora.loaded import merged
from fedlora_flwr.tasks.language_task import LanguageTask
from fedlora_flwr.tasks.registry import class_names, optional
from fedlora_flwr.trained.opened import Adapter, opened
from fedlora_flwr.trained.saved_task import write_task

if TYPE_CHECKING:
    from fedlora_flwr.tasks.registry import Task, TaskFactory

WEIGHTS = "model.safetensors"


def merge(
    adapter: Adapter,
    output: str | Path,
    *,
    task: str | Task | TaskFactory | None = None,
    **changes: Any,
) -> Path:
    """Write a plain model with the adapter merged into its weights, as ``fedlora merge`` does.

    A model of transformers or timm becomes a folder that its own library loads. Of another model,
    the folder holds the state dict, ``model.safetensors``. `evaluate` and `predict` also take the
    folder of a merged language model, unless that model is read by the mean.

    Parameters
    ----------
    adapter : str, Path or RunResult
        A run's folder, an adapter's folder, or the result of a run.
    output : str or Path
        The folder of the model. It must be new.
    task : str, Task or callable, optional
        The task's name or object, if it is not the run's.
    **changes : Any
        Settings by key that replace those of the run, such as ``model="/models/bert"``.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    InvalidValue
        The folder holds no adapter, the base model cannot be found, or ``output`` exists.

    Examples
    --------
    >>> import tempfile
    >>> from fedlora_flwr import simulate
    >>> folder = tempfile.mkdtemp()
    >>> result = simulate("digits", num_clients=2, num_rounds=1, local_steps=1, output=folder)
    >>> [file.name for file in merge(result, f"{folder}/model").iterdir()]
    ['model.safetensors']
    """
    require("client")
    path = Path(output).expanduser().resolve()
    if path.exists():
        raise InvalidValue("output", str(path), "a folder that does not exist")
    with opened(adapter, None, task, {"device": "cpu", **changes}) as found:
        found.require_factors()
        model = merged(found.model)
        save = optional(found.task, "save_model") or _save_weights
        private_folder(path.parent)
        with replacing(path) as draft, explained("Writing the model", "Set another output."):
            draft.mkdir()
            save(model, draft)
            if isinstance(found.task, LanguageTask) and found.config.pooling == "model":
                # The model is the folder itself, wherever it will be.
                write_task(draft, replace(found.config, model=""), class_names(found.task))
    return path


def _save_weights(model: nn.Module, folder: Path) -> None:
    # safetensors refuses tensors that share memory.
    state = {name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
