"""A task that goes wrong on a device while a file in the device's folder says so."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from torch import Tensor, nn

from fedlora_flwr.data.records import Batch
from fedlora_flwr.tasks.text_classification import TextClassification

NAME = f"{__name__}:Faulty"
FOLDER = "FEDLORA_TEST_FAULTS"
HANG, HANGING, KILL, RAISE = "hang", "hanging", "kill", "raise"


class Faulty(TextClassification):
    """Hangs, raises or dies in the first loss of a round."""

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Go wrong as asked, or return each record's loss."""
        # The server has no such folder, and no faults.
        faults = Path(os.environ.get(FOLDER, os.devnull))
        if (faults / KILL).exists():
            (faults / KILL).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if (faults / RAISE).exists():
            raise RuntimeError("Record 17 says: Jane Doe, born 1970.")
        while (faults / HANG).exists():
            (faults / HANGING).touch()
            time.sleep(0.2)
        return super().losses(model, batch)
