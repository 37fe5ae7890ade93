"""What the tests of prepared records prepare; runs as a program to do it in another process."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fedlora_flwr.data.prepared import prepare
from fedlora_flwr.data.sources import load_split

COLUMNS = ["input_ids", "pixels", "label"]


def tokens(rows: dict[str, list[Any]]) -> dict[str, Any]:
    """Make a list of word lengths, and a picture that tells which record it is of."""
    lengths = [[len(word) for word in text.split()] for text in rows["text"]]
    pixels = np.array([np.full((3, 2, 4), row % 256, dtype=np.uint8) for row in rows["row"]])
    return {"input_ids": lengths, "pixels": pixels}


def slowly(rows: dict[str, list[Any]]) -> dict[str, Any]:
    """Do the same, and leave a trace of each call and the process that made it."""
    with Path(os.environ["TRACE"]).open("a") as trace:
        trace.write(f"{os.getpid()}\n")
    time.sleep(0.2)
    return tokens(rows)


if __name__ == "__main__":
    prepared = prepare(load_split(sys.argv[1], "train"), slowly, {}, COLUMNS)
    print(prepared.cache_files[0]["filename"])
