"""Put on a server's path as ``sitecustomize``: a curious server runs in place of the package's.

Devices answer only where the bundle is the package's own, which a server can ship and not run.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

FOLDER = "FEDLORA_TEST_CURIOUS"
FILE = "FEDLORA_TEST_CURIOUS_FILE"
READY = "order.json"


class Finder:
    """Finds another file under the name of the package's own server."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        ready = (Path(os.environ[FOLDER]) / READY).exists()
        if name != "fedlora_flwr.server_app" or not ready:
            return None
        return spec_from_file_location(name, os.environ[FILE])


if FILE in os.environ:
    sys.meta_path.insert(0, Finder)
