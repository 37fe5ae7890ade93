"""How a sentence encoder was trained to be read, as its own checkpoint tells.

The library sentence-transformers writes ``modules.json``, which names the folder of the pooling
module, and this module's ``config.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedlora_flwr.data.hub import hub_answers, own_copies_only

_MODULES, _CONFIG, _POOLING = "modules.json", "config.json", "Pooling"


def is_read_by_mean(model: str) -> bool:
    """Return whether a checkpoint was trained to be read by the mean of its tokens' states.

    Parameters
    ----------
    model : str
        A folder, or a name on the hub.

    Returns
    -------
    bool
        Also ``False`` where the checkpoint does not tell, or the hub does not answer.
    """
    modules = _read(model, _MODULES)
    listed = modules if isinstance(modules, list) else []
    for module in (entry for entry in listed if isinstance(entry, dict)):
        if str(module.get("type", "")).rpartition(".")[2] == _POOLING:
            config = _read(model, f"{module.get('path', '')}/{_CONFIG}")
            return isinstance(config, dict) and _by_mean(config)
    return False


def _by_mean(config: dict[str, Any]) -> bool:
    """Read both forms: one mode by name, or a switch for each mode."""
    if "pooling_mode" in config:
        return bool(config["pooling_mode"] == "mean")
    modes = {key for key, value in config.items() if key.startswith("pooling_mode_") and value}
    return modes == {"pooling_mode_mean_tokens"}


def _read(model: str, file: str) -> Any:
    """Return the content of a checkpoint's JSON file; ``None`` if there is none."""
    from huggingface_hub import hf_hub_download

    folder = Path(model).expanduser()
    try:
        if folder.is_dir():
            path = folder / file
        else:
            offline = not hub_answers()
            with own_copies_only(offline):
                path = Path(hf_hub_download(model, file, local_files_only=offline))
        return json.loads(path.read_text(encoding="utf-8"))
    except Exception:  # Most checkpoints are not from that library. Only a hint depends on it.
        return None
