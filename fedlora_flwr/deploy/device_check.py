"""Checks of a device's own settings, records, budget and backbone for a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_flwr.clients.device import Device
from fedlora_flwr.config import RunConfig
from fedlora_flwr.data.names import names
from fedlora_flwr.data.sources import is_hub_name, load_split, split_files
from fedlora_flwr.data.unusable import naming_split
from fedlora_flwr.data.users import count_units
from fedlora_flwr.deploy.findings import Finding, tried
from fedlora_flwr.deploy.fleet import SETTINGS
from fedlora_flwr.errors import BudgetExhausted, FedLoRAError, InvalidValue, unknown
from fedlora_flwr.files import data_folder
from fedlora_flwr.tasks.registry import (
    build_task,
    private_reading,
    required_on_device,
    unstated_classes,
)

if TYPE_CHECKING:
    from fedlora_flwr.privacy.account import Account
    from fedlora_flwr.privacy.budget import Segment
    from fedlora_flwr.privacy.foreseen import Foreseen
    from fedlora_flwr.privacy.ledger import Ledger
    from fedlora_flwr.privacy.mechanism import Mechanism

_PATIENCE = 10.0  # seconds
_COLUMNS = ("input-columns", "label-column")


class Backbone:
    """The fingerprint of the run's model. It is computed once per name of a model."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self._known: dict[str, str] = {}

    def of(self, config: RunConfig) -> str:
        """Return the fingerprint of the model that a configuration names."""
        from fedlora_flwr.lora.build import build_adapted

        if config.model not in self._known:
            adapted = build_adapted(config, build_task(config.task, config))
            self._known[config.model] = adapted.fingerprint
        return self._known[config.model]


def device_findings(
    folder: Path, name: str, run: RunConfig | None, backbone: Backbone | None, here: bool = False
) -> Iterator[Finding]:
    """Look at a device's own folder.

    Parameters
    ----------
    folder : Path
        The device's folder.
    name : str
        The device's name, for the findings.
    run : RunConfig, optional
        The planned run.
    backbone : Backbone, optional
        The server's backbone, if the operator checks the fleet's folder.
    here : bool (default: False)
        Whether the check runs on the device itself, where its records should be.
    """
    file = folder / SETTINGS
    settings = tried(name, lambda: Device.read(file), f"see {file}", file)
    if isinstance(settings, Finding):
        yield settings
        return
    yield Finding(name, True, f"settings of {settings.client!r} can be read")
    for key, why in settings.undone():
        text = f"{key} = {settings.settings[key]!r} breaks the promise: {why}"
        fix = f"remove the line from {file}, unless the server may know these records"
        yield Finding(name, False, text, fix)
    if run is None and not here:
        return
    missing = tried(name, settings.require, "run it in the environment of this command")
    if missing:
        yield missing
    if run is None:
        yield from _in_place(name, settings.settings, file)
        if not missing:
            yield from _columns(name, settings.settings, file)
    elif not missing:
        yield from _for_run(name, settings, file, run, backbone)


def require_in_place(device: Device, file: Path) -> None:
    """Make sure, without opening any, that a device's records and model are where its file says.

    Parameters
    ----------
    device : Device
        The device.
    file : Path
        The file that it was read from.

    Raises
    ------
    FedLoRAError
        Something is not there.
    """
    for found in _in_place(file.name, device.settings, file):
        if not found.good:
            raise FedLoRAError(f"{found.subject}: {found.text.rstrip('.')}. To fix: {found.fix}.")


def _for_run(
    name: str, settings: Device, file: Path, run: RunConfig, backbone: Backbone | None
) -> Iterator[Finding]:
    config = tried(name, lambda: settings.config(run.items()), f"see {file}", file)
    if isinstance(config, Finding):
        yield config
        return
    # A file that names no state-dir means the data folder of the device's user, who looks here.
    state = Path(config.state_dir) if config.state_dir else None
    if state is None and backbone is None:
        state = data_folder()
    if backbone is not None and _absent("dataset", settings.settings, file.parent):
        text = "its records are not in this folder: run `fedlora deploy check` on the device"
        yield Finding(name, True, text)
    else:
        yield from _promise(name, settings.client, config, file, state)
    if backbone is not None and _absent("model", settings.settings, file.parent):
        yield Finding(name, True, "its model is not in this folder either: check it on the device")
        return
    known = backbone or Backbone(run)
    own = tried(name, lambda: known.of(config), f"see model in {file}", file)
    if isinstance(own, Finding):
        yield own
        return
    if backbone is None:
        yield Finding(name, True, f"backbone {own}, which must be the same as the server's")
        return
    same = own == backbone.of(run)
    text = f"backbone {own}" + ("" if same else f", the server's is {backbone.of(run)}")
    yield Finding(name, same, text, "put the server's model there")


def _in_place(name: str, settings: Mapping[str, Any], file: Path) -> Iterator[Finding]:
    """Look, without opening any, whether model and records are where the device's file says."""
    needed = {key for keys in required_on_device(settings["task"]) for key in keys}
    for key in (key for key in ("model", "dataset") if key in needed & settings.keys()):
        value, place = str(settings[key]), _place(key, settings, file.parent)
        if place.exists():
            yield Finding(name, True, f"{key} is at {place}")
        elif not _absent(key, settings, file.parent):
            yield Finding(name, True, f"{key} {value!r} is not a path here, but a name on the hub")
        else:
            fix = f"put it there, or correct {key} in {file}; a name on the hub is owner/name"
            yield Finding(name, False, f"{key} = {value!r}, but {place} does not exist", fix)
    if "dataset" in needed:
        own = {"train-split": RunConfig.train_split, "dataset-subset": "", **settings}
        with_keys = naming_split("train-split")(split_files)
        found = tried(
            name,
            lambda: with_keys(own["dataset"], own["train-split"], subset=own["dataset-subset"]),
            f"see dataset in {file}",
            file,
        )
        if isinstance(found, Finding):
            yield found


def _columns(name: str, settings: Mapping[str, Any], file: Path) -> Iterator[Finding]:
    """Look whether local records have the columns that the device's file names."""
    split = str(settings.get("train-split", RunConfig.train_split))
    source, subset = str(settings.get("dataset", "")), str(settings.get("dataset-subset", ""))
    if not (source and _place("dataset", settings, file.parent).exists()):
        return
    stated = [(key, word) for key in _COLUMNS for word in names(str(settings.get(key, "")))]
    try:
        found = load_split(source, split, subset=subset).column_names if stated else []
    except FedLoRAError:
        return  # `_in_place` tells this error, or the check with a recipe.
    for key, word in stated:
        if word not in found:
            text = str(unknown(key, word, found, after=f", the columns of {source}"))
            yield Finding(name, False, text, f"correct {key} in {file}")


def _absent(key: str, settings: Mapping[str, Any], folder: Path) -> bool:
    """Tell whether a device's own file names a place that does not exist on this machine."""
    if not settings.get(key) or _place(key, settings, folder).exists():
        return False
    return not _may_be_on_hub(key, str(settings[key]), folder)


def _place(key: str, settings: Mapping[str, Any], folder: Path) -> Path:
    return folder / Path(str(settings[key])).expanduser()


def _may_be_on_hub(key: str, value: str, folder: Path) -> bool:
    if key == "model":  # Names of some of the hub's models, and of timm's, are a single word.
        return value[0] not in "/.~"
    owner, slash, _ = value.partition("/")
    return bool(slash) and is_hub_name(value) and not (folder / owner).exists()


def _promise(
    name: str, client: str, config: RunConfig, file: Path, state: Path | None
) -> Iterator[Finding]:
    task = build_task(config.task, config)

    def records() -> tuple[int, list[str]]:
        if found := unstated_classes(task):
            allowed = f"the names {found} in the same order as on all other devices"
            raise InvalidValue("class-names", "", f"{allowed}; num-classes does not tell the order")
        return count_units(config.unit, task.client_records(0, 1)), private_reading(task)

    opened = tried(name, records, f"see dataset and columns in {file}", file)
    if isinstance(opened, Finding):
        yield opened
        return
    count, lines = opened
    yield from (Finding(name, True, line) for line in lines)
    yield from _budget(name, client, config, count, state)


def _budget(
    name: str, client: str, config: RunConfig, count: int, state: Path | None
) -> Iterator[Finding]:
    """Say what a run would cost the device's budget, and what is spent of it."""
    from fedlora_flwr.privacy.account import UNBOUND
    from fedlora_flwr.privacy.budget import Segment
    from fedlora_flwr.privacy.calibration import calibrated_mechanism
    from fedlora_flwr.privacy.ledger import LEDGER, Account, Ledger

    account = Account.of(config, client, "")
    ledger = None
    if state is not None and Ledger.exists(path := state / LEDGER):
        ledger = tried(name, lambda: Ledger(path, patience=_PATIENCE), "do as this message says")
        if isinstance(ledger, Finding):
            yield ledger
            return

    def plan() -> Mechanism:
        terms = ledger.terms(account) if ledger else UNBOUND
        return calibrated_mechanism(config, count, terms=terms)

    mechanism = tried(name, plan, "more records, or another epsilon and delta")
    if isinstance(mechanism, Finding):
        yield mechanism
        return
    yield Finding(
        name,
        True,
        f"{count} {config.unit}s, ε ≤ {config.epsilon:g} for each at δ = {config.delta:g} with "
        f"noise multiplier {mechanism.noise_multiplier:.3g}",
    )
    if not ledger and state is None:
        elsewhere = "its ledger is on the device, since its device.toml has no state-dir"
        yield Finding(name, True, elsewhere)
        return
    planned = Segment(mechanism.noise_multiplier, mechanism.sample_rate, config.planned_steps)
    yield _foreseen(name, account, ledger, planned)


def _foreseen(name: str, account: Account, ledger: Ledger | None, planned: Segment) -> Finding:
    """Say what is spent, what will be after the run, and how many more runs like it fit."""
    from fedlora_flwr.privacy.foreseen import foresee
    from fedlora_flwr.privacy.ledger import LAPSE

    def look(plan: Segment) -> Foreseen:
        return ledger.foresee(account, plan) if ledger else foresee(account, [], plan, LAPSE)

    try:
        found = look(planned)
    except BudgetExhausted as error:
        fix = "fewer rounds, or another epsilon if the data's owners agree"
        if isinstance(tried(name, lambda: look(replace(planned, steps=1)), ""), Finding):
            fix = (
                "use other records, or a run with more noise or smaller batches; a larger epsilon "
                "weakens the promise for all earlier runs, too"
            )
        return Finding(name, False, str(error), fix)
    except (FedLoRAError, OSError) as error:
        return Finding(name, False, str(error), "do as this message says")
    text = _in_words(account, found)
    if found.changed:
        text += (
            f". Warning: epsilon or delta of its file ({account.epsilon:g}, {account.delta:g}) was "
            "another one at the first run. A larger budget weakens what was promised then"
        )
    return Finding(name, True, text)


def _in_words(account: Account, found: Foreseen) -> str:
    before = f"ε = {found.before:.3g} spent" if found.before else "nothing spent yet"
    text = f"{before}; {found.after:.3g} of {account.epsilon:g} after this run"
    if f"{found.alone:.3g}" != f"{found.after:.3g}":
        text += f" (this run alone: {found.alone:.3g})"
    if found.more is None:
        return f"{text}. It limits no later run"
    if found.more == 0:
        return f"{text}. After it no more run like it fits"
    from fedlora_flwr.privacy.foreseen import MOST

    least = "at least " if found.more == MOST else ""
    runs = "1 more run like it fits" if found.more == 1 else f"{found.more} more runs like it fit"
    return f"{text}. After it {least}{runs}"
