"""A method's declaration: what it can do, and which settings it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fedlora_flwr.config.keys import (
    Check,
    Decider,
    Value,
    check_value,
    fields_by_key,
    key,
    widen,
)
from fedlora_flwr.errors import InvalidValue, near_names


@dataclass(frozen=True)
class NoSettings:
    """The settings of a method that has none of its own."""


def setting(default: Value, check: Check, about: str) -> Any:
    """Declare a setting of a method, as a field of a dataclass. The server alone reads it.

    Parameters
    ----------
    default : bool, int, float or str
        Its default; its type is the setting's type.
    check : Check
        Which values of that type are allowed, and the words for it, e.g. ``between(0, 1)``.
    about : str
        What the setting is for.
    """
    return key(default, check, about, Decider.RUN, "Only the server reads it.")


class Declared:
    """A method's declaration. Each attribute may be overridden in the method's class.

    Attributes
    ----------
    name : str
        The table of the run configuration that holds the method's settings. Empty where it has no
        settings, or only keys of the run configuration itself.
    settings : type
        A frozen dataclass with one field per setting, each made by `setting`. A strategy takes
        them as arguments, and has each as an attribute.
    reads : tuple[str, ...]
        Names of further arguments that are keys of the run configuration, such as ``"lr_a"``.
    shared : str
        The factors that travel, where not everything does (see `fedlora_flwr.layout.is_shared`).
    own_models : bool
        Whether each client keeps a model of its own, from which its next round starts.
    personal : bool
        Whether clients have models of their own, of which a factor or all of it stays with them, so
        that the server has no model to measure or to average. Follows from ``shared`` and
        ``own_models``.
    stable_basis : bool
        Whether factors of two rounds are in one basis, so that their mean over rounds is a model.
    folds : bool
        Whether updates are folded into the frozen weights, which then have to be their own and in
        full precision.
    averages : bool
        Whether `aggregate` returns the mean of the uploads and nothing else. False for a method
        that overrides it and does not say.
    needs_each_upload : bool
        Whether `aggregate` cannot work with the mean of the uploads in place of each of them, as
        secure aggregation hands over. True for a method that overrides it and does not say.
    own_ranks : bool
        Whether clients may train at ranks of their own.
    paper : tuple[str, ...]
        Title and arXiv number of the method's paper, for the model card; or nothing.
    """

    name: ClassVar[str] = ""
    settings: ClassVar[type] = NoSettings
    reads: ClassVar[tuple[str, ...]] = ()
    shared: str = ""
    own_models: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    stable_basis: ClassVar[bool] = True
    folds: ClassVar[bool] = False
    averages: ClassVar[bool] = True
    needs_each_upload: ClassVar[bool] = False
    own_ranks: ClassVar[bool] = False
    paper: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Fill in what follows from what a class says."""
        super().__init_subclass__(**kwargs)
        cls.personal = cls.own_models or len(cls.shared) == 1
        if "aggregate" in vars(cls):  # A class that declares nothing gets the cautious answer.
            cls.averages = vars(cls).get("averages", False)
            cls.needs_each_upload = vars(cls).get("needs_each_upload", True)

    def check_model(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a model that the method cannot train, before a run begins; by default, none.

        Parameters
        ----------
        shapes : Mapping[str, tuple]
            The shapes of the arrays from which the run starts, folded pairs among them.

        Raises
        ------
        InvalidValue
            The method cannot train it.
        """

    @classmethod
    def no_server_step(cls) -> str:
        """Return the reason why the server's optimizer cannot move the model; empty if it can."""
        if cls.personal:
            return "a factor stays with each client, and the server cannot move it"
        if not cls.averages:
            return "its aggregation is not a mean, so no update of the model can be read off it"
        return ""

    def check_server_step(self, optimizer: str) -> None:
        """Refuse an optimizer of the server that cannot move the model; ``"none"`` can.

        Raises
        ------
        InvalidValue
            There is no model to move, or no mean of updates to move it by.
        """
        reason = self.no_server_step() or (self.shared and "each client keeps its head")
        if optimizer != "none" and reason:
            raise InvalidValue("server-optimizer", optimizer, f"'none': {reason}")

    def take_settings(self, given: Mapping[str, Any]) -> None:
        """Check a method's own arguments, and keep them as attributes.

        Raises
        ------
        TypeError
            There is an argument of another name, or a setting with the name of something else.
        InvalidValue
            A value is of another type, or out of range.
        """
        owner = type(self).__name__
        for name, value in read_settings(self.settings, owner, given).items():
            if hasattr(self, name):
                raise TypeError(f"{owner}: every strategy has {name!r}. Rename the setting.")
            setattr(self, name, value)


def read_settings(settings: type, owner: str, given: Mapping[str, Any]) -> dict[str, Value]:
    """Return all settings by name, with defaults for those that are not given.

    Parameters
    ----------
    settings : type
        The dataclass that declares them.
    owner : str
        Name of the method that has the settings, for the error.
    given : Mapping[str, Any]
        Values by name.

    Raises
    ------
    TypeError
        A name is unknown.
    InvalidValue
        A value is of another type, or out of range.
    """
    known = {entry.name: entry for entry in fields_by_key(settings).values()}
    for name in given:
        if name not in known:
            near = "".join(f", did you mean {n!r}?" for n in near_names(name, known))
            raise TypeError(f"{owner} got an unexpected keyword argument {name!r}{near}")
    found = {}
    for name, entry in known.items():
        # A NumPy number is not of a type that a setting may have, so it is converted.
        value = given.get(name, entry.default)
        value = value.item() if hasattr(value, "item") else value
        found[name] = widen(entry, value)
        check_value(entry, found[name])
    return found
