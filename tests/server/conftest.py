from __future__ import annotations

from pathlib import Path

import pytest

from fedlora_flwr.config import RunConfig
from fedlora_flwr.server.run_dir import RunDirectory
from tests.conftest import MakeConfig
from tests.server.support import run


@pytest.fixture
def finished(make_config: MakeConfig, tmp_path: Path) -> tuple[RunConfig, RunDirectory]:
    config = make_config()
    return config, run(config, tmp_path / "run")[0]
