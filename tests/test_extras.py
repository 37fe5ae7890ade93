"""Which extra installs what, and the one sentence where something is not installed."""

from __future__ import annotations

import ast
import json
import logging
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedlora_flwr.clients.guarded import guarded
from fedlora_flwr.environment import simulating
from fedlora_flwr.errors import (
    EXTRAS,
    ClientFailed,
    FedLoRAError,
    NotInstalled,
    explained,
    require,
)
from fedlora_flwr.terminal import told
from tests.installed import OWNERS, PROJECT, ROOT, absent_with, distributions, named_by, run_with

SOURCES = sorted((ROOT / "fedlora_flwr").rglob("*.py"))
# Rooms and modules that train, or build a model. Everything else belongs to the core.
NEED_MORE = re.compile(
    r"audit\.|backbones\.|lora\.|privacy\.|forecast\.|studies\.|tasks\.|trained\."
    r"|data\.(arrow_records|pictures|records)$"
    r"|clients\.(handler|local_round|local_store|numpy_client|own_labels|sharing|trainer)$"
    r"|integrations\.(hf_trainer|planned_loop|trainer_arguments)$"
    r"|secure_sum\.(accounting|rounding)$|server\.(checkpoint|keeper|noise|norm_bound|rehearsal|serve|strategy|sum_step)$"
    r"|cli\.\w+_screen$|simulations\.(launch|runner|simulate)$"
)
NEED_CLIENT = {
    "AdaptedModel", "LoRAClient", "LoRASpec", "Ledger", "LocalRound", "LocalTrainer", "Mechanism",
    "PrivateEngine", "PrivateTrainer", "TensorRecords", "answer_message", "attach", "calibrate",
    "epsilon_spent", "follow_fit", "follow_plan", "OptimizerSettings", "SecureNoise", "SeededNoise",
    "Account", "Segment", "Spent", "spent", "simulate", "plan_run", "audit_run", "evaluate",
    "Evaluation", "sharpness", "Sharpness", "predict", "merge", "TableTask", "plan_budget",
    "rounds_within", "strategy_of",
}  # fmt: skip
NEED_PLOTS = {"compare", "Compared"}


def imported(path: Path) -> Iterator[str]:
    """Yield the modules of other packages that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_table_of_extras_is_that_of_the_project(extra: str) -> None:
    names = {canonicalize_name(OWNERS.get(module, [module])[0]) for module in EXTRAS[extra]}
    listed = {line.replace("flwr[simulation]", "ray") for line in named_by(extra)}
    assert names == {canonicalize_name(Requirement(line).name) for line in listed}


def test_extras_are_those_of_the_table_all_of_them_and_tools() -> None:
    extras = PROJECT["optional-dependencies"]
    assert extras.keys() - {"all", "docs", "dev"} == EXTRAS.keys()
    (everything,) = map(Requirement, extras["all"])
    apart = {"quantized", "tensorboard", "mlflow", "wandb", "optuna"}
    assert (everything.name, everything.extras) == (PROJECT["name"], EXTRAS.keys() - apart)


def test_each_package_that_is_imported_is_asked_for_and_no_other() -> None:
    found = {module for path in SOURCES for module in imported(path)}
    found -= {*sys.stdlib_module_names, "fedlora_flwr"}
    optional = {module for modules in EXTRAS.values() for module in modules}
    core = {canonicalize_name(Requirement(line).name) for line in named_by()}
    assert optional - found == {"bitsandbytes"}  # transformers imports it.
    assert found - optional == core


def test_nothing_heavy_comes_with_the_core() -> None:
    assert absent_with() == sorted({m for modules in EXTRAS.values() for m in modules})
    assert len(distributions(named_by())) < 60


WALK = """
import importlib, pkgutil
import fedlora_flwr

failed = {}
for module in pkgutil.walk_packages(fedlora_flwr.__path__, "fedlora_flwr."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            failed[module.name.removeprefix("fedlora_flwr.")] = error.name

missing = {}
for name in set(fedlora_flwr.__all__):
    try:
        getattr(fedlora_flwr, name)
    except fedlora_flwr.errors.NotInstalled as error:
        missing[name] = str(error)
print(json.dumps([failed, missing, sorted({"torch", "scipy", "pandas"} & sys.modules.keys())]))
"""


def test_the_core_imports_without_any_extra(tmp_path: Path) -> None:
    failed, missing, loaded = json.loads(run_with(code=WALK, cwd=tmp_path))
    assert [name for name in failed if not NEED_MORE.match(name)] == []
    assert failed["privacy.engine"] == "torch"
    assert loaded == []
    assert missing.keys() == NEED_CLIENT | NEED_PLOTS
    for name, sentence in missing.items():
        extra = "plots" if name in NEED_PLOTS else "client"
        assert re.fullmatch(
            rf"\w+ is not installed\. Run pip install 'fedlora-flwr\[{extra}\]'\.", sentence
        )


COMMANDS = {
    "run digits": "client,vision,simulation",
    "run sst2-minilm": "client,text,simulation",
    "simulate digits": "client,vision,simulation",
    "plan digits --records 100": "client,vision",
    "plan sst2-minilm": "client,text,simulation",
    "inspect-split digits": "client,vision,plots,simulation",
    "compare": "client,vision,plots,simulation",
    "audit digits": "client,vision,simulation",
    "budget --epsilon 3 --delta 1e-5 --records 1000 --batch-size 10 --steps 5": "client",
    "plan digits -c task=nothing": "task = 'nothing' cannot be used",
    "plot run": "plots",
    "evaluate run": "client,plots",
    "predict run records.csv": "client,plots",
    "merge run -o model": "client",
    "pretrain tiny-imagenet": "client,vision",
    "-h": "",
    "--version": "",
    "ledger": "client",
    "recipes": "",
    "keys": "",
    "keys strategy": "",
    "deploy init fleet --devices 2": "",
    "deploy check fleet": "",
    "deploy check fleet/devices/device-01": "client,vision",
    "deploy start": "client,vision",
}
CLI = """
import os
from pathlib import Path
from typer.testing import CliRunner
from fedlora_flwr.cli import app

Path("run").mkdir()
Path("run/rounds.jsonl").write_text("")
done = {}
for command in %s:
    if command == "deploy check fleet/devices/device-01":
        file = Path("fleet/devices/device-01/device.toml")
        file.write_text('client-id = "one"\\nepsilon = 1.0\\ndelta = 1e-5\\ntask = "digits"\\n')
    if command == "deploy start":
        os.chdir("fleet/devices/device-01")
    result = CliRunner().invoke(app, command.split())
    done[command] = [result.exit_code, result.output]
print(json.dumps(done))
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and output of each command where the core alone is installed."""
    said = run_with(code=CLI % list(COMMANDS), cwd=tmp_path_factory.mktemp("core"))
    found: dict[str, tuple[int, str]] = json.loads(said.splitlines()[-1])
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_the_extras_that_it_needs(
    command: str, commands: dict[str, tuple[int, str]]
) -> None:
    code, output = commands[command]
    extras = COMMANDS[command]
    if not extras:
        assert code == 0, output
        assert "not installed" not in output
        return
    assert code == 1
    if "cannot be used" in extras:  # A mistake is told before anything has to be installed.
        assert extras in output
        assert "not installed" not in output
        return
    assert f"not installed. Run pip install 'fedlora-flwr[{extras}]'." in output
    if "check" not in command:  # It has other findings, too.
        assert len(output.splitlines()) == 1
    assert "Traceback" not in output


APPS = """
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import NotInstalled
from fedlora_flwr.files import data_folder
from fedlora_flwr import client_app, server_app

config = dict(RunConfig().items())
for task in ("digits", "text-classification", "own:Task"):
    asked = {**config, "task": task, "model": "m", "dataset": "d", "input-columns": "text"}
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=asked)
    try:
        server_app.main(None, context)
    except NotInstalled as error:
        print(error)
print(data_folder().exists())

from fedlora_flwr import RoLoRA
from fedlora_flwr.simulations.local_grid import LocalGrid
from tests.strategies.tiny import record_of, start_arrays

with LocalGrid(client_app.respond, 2, config).running() as grid:
    RoLoRA(min_completion=0.5).start(grid, record_of(start_arrays()), num_rounds=1)
"""


def test_the_apps_say_what_is_not_installed(tmp_path: Path) -> None:
    code = "try:\n    exec(APPS)\nexcept Exception as error:\n    print(error)"
    said = run_with(code=f"APPS = {APPS!r}\n{code}", cwd=tmp_path).splitlines()
    run = "Run pip install 'fedlora-flwr"
    assert said[:3] == [
        f"torch and 13 more packages are not installed. {run}[client,vision]'.",
        f"torch and 11 more packages are not installed. {run}[client,text]'.",
        f"torch and 6 more packages are not installed. {run}[client]'.",
    ]
    assert said[3] == "False"  # Nothing was begun.
    assert f"not installed. {run}[client" in "\n".join(said[4:])


def test_errors_that_have_another_cause_are_left_as_they_are() -> None:
    assert NotInstalled.of(ModuleNotFoundError("No module named 'torch'", name="torch")) is None
    assert NotInstalled.of(ModuleNotFoundError("No module named 'own'", name="own")) is None
    assert NotInstalled.of(ImportError("cannot import name 'x' from 'torch'", name="torch")) is None
    assert NotInstalled.of(ValueError("torch")) is None


def test_a_folder_of_the_users_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bitsandbytes").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(NotInstalled, match="bitsandbytes is not installed"):
        require("quantized")
    (tmp_path / "bitsandbytes" / "__init__.py").touch()
    require("quantized")


@pytest.fixture
def without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a package away that has to be found again for each import of it."""
    monkeypatch.setitem(sys.modules, "PIL", None)


@pytest.mark.usefixtures("without_pillow")
def test_a_missing_package_is_told_wherever_it_is_met() -> None:
    sentence = "PIL is not installed. Run pip install 'fedlora-flwr[vision]'."
    with pytest.raises(NotInstalled) as found, explained("Building the model", "Do something."):
        import PIL.Image
    assert str(found.value) == sentence
    assert isinstance(found.value, FedLoRAError)
    assert str(pickle.loads(pickle.dumps(found.value))) == sentence
    with pytest.raises(ModuleNotFoundError) as plain:
        import PIL  # noqa: F401
    assert told(plain.value) == sentence
    with pytest.raises(NotInstalled) as asked:
        require("text", "PIL", "plots")
    assert str(asked.value) == sentence


@pytest.mark.usefixtures("without_pillow")
def test_a_server_is_not_told_what_a_device_has_not_installed(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        import PIL  # noqa: F401

    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    with pytest.raises(ClientFailed, match="could not do what was asked") as found:
        guarded(work)
    assert "PIL" not in str(found.value)
    (record,) = set(caplog.records)  # A handler that another test left may list it twice.
    assert "PIL is not installed. Run pip install 'fedlora-flwr[vision]'." in record.getMessage()
    assert not record.exc_info
    with simulating(), pytest.raises(NotInstalled, match="PIL is not installed"):
        guarded(work)
