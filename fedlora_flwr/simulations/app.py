"""The app that ``flwr run`` ships: a single file that names the installed package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fedlora_flwr.config import RunConfig, Value
from fedlora_flwr.files import replace_file

PROJECT_FILE = "pyproject.toml"
PACKAGE = "fedlora-flwr"
COMPONENTS = {
    "serverapp": "fedlora_flwr.server_app:app",
    "clientapp": "fedlora_flwr.client_app:app",
}
_PROJECT = f"""[project]
name = "fedlora-run"
version = "0.1.0"
description = "Differentially private federated LoRA, run by the installed {PACKAGE}."
license = "Apache-2.0"
dependencies = ["{PACKAGE}"]

[tool.flwr.app]
publisher = "fedlora"

[tool.flwr.app.components]
serverapp = "{COMPONENTS["serverapp"]}"
clientapp = "{COMPONENTS["clientapp"]}"

# Every key with its default; `fedlora keys` explains them. `--run-config` overrides them.
"""


def write_app(folder: Path, own: Mapping[str, Value] | None = None) -> None:
    """Write the app into a folder, and make the folder if needed.

    Flower's bundle of this app holds no code: servers and clients run the installed package.

    Parameters
    ----------
    folder : Path
        The app's folder.
    own : Mapping[str, Value], optional
        Settings from a method's own table. They are written too, because Flower overrides only keys
        that it finds.
    """
    folder.mkdir(exist_ok=True)
    config = replace(RunConfig(), own=tuple((own or {}).items()))
    text = _PROJECT + config.to_toml(table="tool.flwr.app.config.")
    replace_file(folder / PROJECT_FILE, text.encode())
