"""What a hostile operator ships: bundles whose code leaves a file behind where it is imported."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

FOLDER = "FEDLORA_TEST_CANARIES"
NAMED = "names-another-module"
_CLIENT = "\nfrom flwr.clientapp import ClientApp\napp = ClientApp()\n"
_SERVER = "import tests.deploy.hostile as hostile\napp = hostile.server\n"
# Written out: where one of these bundles is loaded, it has taken our package's place.
_OURS = {
    "serverapp": "fedlora_flwr.server_app:app",
    "clientapp": "fedlora_flwr.client_app:app",
}


def canary(name: str) -> str:
    """Return a module's text that leaves a file of this name where a device says so."""
    return (
        "import os, pathlib\n"
        f"if folder := os.environ.get({FOLDER!r}):\n"
        f"    (pathlib.Path(folder) / {name!r}).touch()\n"
    )


exec(canary(NAMED))
NODES = 2
client = ClientApp()
server = ServerApp()


@server.main()
def ask(grid: Grid, context: Context) -> None:
    """Ask every device something, and write down what it answers."""
    while len(nodes := list(grid.get_node_ids())) < NODES:
        time.sleep(0.5)
    questions = [Message(RecordDict(), node, "query") for node in nodes]
    replies = list(grid.send_and_receive(questions, timeout=200))
    errors = [reply.error.reason if reply.has_error() else "" for reply in replies]
    told = Path(str(context.run_config["told"]))
    draft = told.with_suffix(".draft")
    draft.write_text(json.dumps(errors))
    draft.replace(told)


def bundles() -> Iterator[tuple[str, dict[str, str], dict[str, str], list[str]]]:
    """Yield names, files, components and dependencies of apps that a device must not serve."""
    name = "shadows-the-package"
    files = {
        "fedlora_flwr/__init__.py": canary(name),
        "fedlora_flwr/client_app.py": canary(name) + _CLIENT,
        "fedlora_flwr/server_app.py": _SERVER,
    }
    yield name, files, _OURS, []
    name = "brings-its-own-client"
    files = {"stranger.py": canary(name) + _CLIENT, "server.py": _SERVER}
    yield name, files, {"serverapp": "server:app", "clientapp": "stranger:app"}, []
    name = "shadows-a-library"
    hidden = ("filelock.py", "sitecustomize.py", "usercustomize.py", "conftest.py")
    files = {"server.py": _SERVER, **dict.fromkeys(hidden, canary(name))}
    yield name, files, {"serverapp": "server:app", "clientapp": _OURS["clientapp"]}, []
    modules = {"serverapp": f"{__name__}:server", "clientapp": f"{__name__}:client"}
    yield NAMED, {}, modules, ["evil"]


def write_hostile(base: Path, told: Path) -> dict[str, Path]:
    """Write the apps; each tells in a file of this folder what devices answered."""
    for name, files, components, dependencies in bundles():
        for path, text in files.items():
            (base / name / path).parent.mkdir(parents=True, exist_ok=True)
            (base / name / path).write_text(text)
        (base / name).mkdir(exist_ok=True)
        named = "".join(f'{key} = "{value}"\n' for key, value in components.items())
        (base / name / "pyproject.toml").write_text(
            f'[project]\nname = "{name}"\nversion = "0.1.0"\nlicense = "Apache-2.0"\n'
            f"dependencies = {json.dumps(dependencies)}\n"
            f'[tool.flwr.app]\npublisher = "stranger"\n[tool.flwr.app.components]\n{named}'
            f'[tool.flwr.app.config]\ntold = "{told / name}"\n'
        )
    return {name: base / name for name, *_ in bundles()}
