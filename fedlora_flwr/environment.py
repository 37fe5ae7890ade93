"""The environment on which a result depends besides its settings: packages and machine."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fedlora_flwr.operating_system import largest_memory

PACKAGES = (
    "fedlora-flwr", "flwr", "ray", "torch", "peft", "timm", "transformers", "opacus",
    "numpy", "scipy",
)  # fmt: skip
_simulating: ContextVar[bool] = ContextVar("simulating", default=False)
_CPU_INFO, _STATUS = Path("/proc/cpuinfo"), Path("/proc/self/status")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, object]:
    """Return the processor's name and number of cores; the result does not identify the host."""
    lines = _CPU_INFO.read_text(encoding="utf-8").splitlines() if _CPU_INFO.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }


def processor() -> str:
    """Return the processor's name and its instructions for bf16, which one name may differ in."""
    text = _CPU_INFO.read_text(encoding="utf-8") if _CPU_INFO.exists() else ""
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    found = sorted({flag for flag in flags.split() if flag.endswith("_bf16") or "amx" in flag})
    return " ".join([str(machine()["cpu"]), *found])


def peak_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes; 0 on Windows.

    On Linux this does not use getrusage, whose figure includes the memory of the parent process at
    the fork.
    """
    if _STATUS.exists():
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return largest_memory() or 0


@contextmanager
def simulating() -> Iterator[None]:
    """Mark code that serves simulated clients, all on this machine (see `in_simulation`)."""
    token = _simulating.set(True)
    try:
        yield
    finally:
        _simulating.reset(token)


def in_simulation() -> bool:
    """Tell whether this process serves clients of a simulation.

    The answer depends only on the process, so no message can change it. It is true if the process
    serves an in-process grid, or if it is a Ray actor, in which Flower's simulations run.
    """
    if _simulating.get():
        return True
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    return ray.get_runtime_context().get_actor_id() is not None


def own_program(name: str) -> str:
    """Return a program of this environment as a shell in which it is not activated runs it.

    Parameters
    ----------
    name : str
        A program that is installed beside this interpreter, such as ``fedlora``.

    Returns
    -------
    str
        The name alone where the shell finds this very program by it; or else its path, quoted.
    """
    here = Path(sys.executable).parent
    found = shutil.which(name)
    if found and here.resolve() in (Path(found).parent.resolve(), Path(found).resolve().parent):
        return name
    own = here / name
    return shlex.quote(str(own)) if own.exists() else name
