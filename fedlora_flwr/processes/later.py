"""Packages that a library imports at its start and seldom uses: they are imported when used."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


@contextmanager
def later(*names: str) -> Iterator[None]:
    """Import a library in this block without some of the modules that it imports.

    The library gets an object in place of each of them, which imports the module when anything of
    it is asked for. Other code is not affected: after the block, the module is imported as usual.

    Parameters
    ----------
    *names : str
        Modules, such as ``"wandb"``. One that is not installed, or is there already, is left alone.

    Examples
    --------
    >>> with later("wave"):
    ...     import wave
    >>> "wave" in sys.modules, wave.open.__name__, "wave" in sys.modules
    (False, 'open', True)
    """
    # `find_spec` imports the package of a name with dots, so such a name is not looked for.
    wanted = (n for n in names if "." in n or importlib.util.find_spec(n) is not None)
    placed = {name: _Later(name) for name in wanted if name not in sys.modules}
    sys.modules.update(placed)
    try:
        yield
    finally:
        for name, module in placed.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


class _Later(ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        # Code that looks for a function's module asks all modules for their files.
        if name == "__file__":
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)
