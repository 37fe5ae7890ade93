"""Install requirements with uv, under the settings that pip has on this machine.

``python -m tools.install REQUIREMENT...`` installs into the environment of the Python that runs
it. uv takes about a third of pip's time. It does not read pip's settings, so mirrors,
certificates and constraints are handed to it here. Where uv can't be had or can't install, pip
does. A quarter of the modules are ever imported, so Python compiles them at their first import.
Where it may not write what it compiles, each process would compile torch and transformers again,
for 10 seconds. All modules are compiled here then, in 40 seconds.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Mapping

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
# pip's settings, and uv's names for them. Lists stand in one variable of uv's.
NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}
# Where uv wants a list with commas. Elsewhere it takes spaces, as pip does.
COMMAS = {"UV_FIND_LINKS"}
# pip reads these sections in this order, and a later one wins.
SECTIONS = ("global", "install", ":env:")


def main(requirements: list[str]) -> int:
    """Install the requirements; return an exit status."""
    if not run(*PIP, "install", "--quiet", "uv"):
        env = {**uv_settings(pip_settings(listed())), **os.environ}
        uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable]
        if sys.dont_write_bytecode:
            uv.append("--compile-bytecode")
        if not run(*uv, *requirements, env=env):
            return 0
    print("uv did not install the packages, so pip does. This takes some minutes.", flush=True)
    return run(*PIP, "install", "--quiet", *requirements)


def run(*command: str, env: Mapping[str, str] | None = None) -> int:
    """Run a command in sight; return its exit status."""
    return subprocess.run(command, env=env, check=False).returncode


def listed() -> str:
    """Return what ``pip config list`` prints: a line ``section.key='value'`` per setting."""
    command = (*PIP, "config", "list")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def pip_settings(text: str) -> dict[str, str]:
    """Return pip's settings for an installation by key, from what ``pip config list`` prints."""
    found: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for line in text.splitlines():
        place, _, value = line.partition("=")
        section, _, key = place.rpartition(".")
        if section in found:
            found[section][key] = str(ast.literal_eval(value))
    return {key: value for section in SECTIONS for key, value in found[section].items()}


def uv_settings(settings: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables that give uv the settings of pip."""
    env = {}
    for key, name in NAMES.items():
        if key in settings:
            env[name] = ("," if name in COMMAS else " ").join(settings[key].split())
    # pip takes the newest release from any of its indexes; uv asks for this to be said.
    return {**env, "UV_INDEX_STRATEGY": "unsafe-best-match"} if "UV_INDEX" in env else env


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
