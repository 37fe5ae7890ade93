"""``fedlora predict``: what an adapter's model says of each record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_flwr.errors import InvalidValue, explained, require
from fedlora_flwr.files import replacing
from fedlora_flwr.tasks.registry import optional
from fedlora_flwr.trained.opened import Adapter, OpenAdapter, opened

if TYPE_CHECKING:
    import pandas as pd

    from fedlora_flwr.data.given import Table
    from fedlora_flwr.tasks.registry import Task, TaskFactory

ENDINGS = (".parquet", ".jsonl", ".csv")
"""Kinds of files that predictions are written to."""


def predict(
    adapter: Adapter,
    data: str | Path | Table,
    output: str | Path | None = None,
    *,
    task: str | Task | TaskFactory | None = None,
    **changes: Any,
) -> pd.DataFrame:
    """Predict with an adapter, as ``fedlora predict`` does.

    Parameters
    ----------
    adapter : str, Path or RunResult
        A run's folder, an adapter's folder, or the result of a run.
    data : str, Path, DataFrame or Dataset
        A file, a folder, or a table. Records need no label.
    output : str or Path, optional
        A file of one of `ENDINGS`, written atomically.
    task : str, Task or callable, optional
        The task's name or object, if it is not the run's.
    **changes : Any
        Settings by key that replace those of the run, such as ``input_columns="text"``.

    Returns
    -------
    pandas.DataFrame
        The columns of the records, without pictures, and what the task predicts: ``prediction`` and
        ``probability`` of a class, or an ``answer``. Rows are in the order of the records.

    Raises
    ------
    InvalidValue
        The folder holds no adapter, a column is missing, or the task does not predict.

    Examples
    --------
    >>> import tempfile
    >>> import pandas as pd, torch
    >>> from fedlora_flwr import TableTask, simulate
    >>> frame = pd.DataFrame({"x": [0.0, 1.0] * 40, "label": ["a", "b"] * 40})
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Linear(4, 2))
    >>> task = TableTask(net, train=frame, test=frame, lora_targets="0", head=("1",))
    >>> small = {"num_clients": 1, "num_rounds": 1, "partitioner": "iid"}
    >>> result = simulate(task=task, output=tempfile.mkdtemp(), **small)
    >>> predict(result, frame[["x"]]).columns.tolist()
    ['x', 'prediction', 'probability']
    """
    require("client", "pandas")
    path = None if output is None else prediction_file(Path(output))
    with opened(adapter, data, task, changes) as found:
        frame = _predicted(found)
    if path is not None:
        _write(frame, path)
    return frame


def prediction_file(path: Path) -> Path:
    """Return the resolved path of a file for predictions.

    Raises
    ------
    InvalidValue
        Its ending is none of `ENDINGS`, or its folder does not exist.
    """
    path = path.expanduser().resolve()
    if path.suffix.lower() not in ENDINGS or not path.parent.is_dir() or path.is_dir():
        allowed = f"a file in a folder that exists, with one of the endings {list(ENDINGS)}"
        raise InvalidValue("output", str(path), allowed)
    return path


def _predicted(found: OpenAdapter) -> pd.DataFrame:
    import pandas as pd

    predictions = optional(found.task, "predictions")
    if predictions is None:
        allowed = "a task that predicts for the records of a file, with a method predictions"
        raise InvalidValue("task", found.task.name, allowed)
    assert found.data is not None
    with explained("Predicting", "Set a smaller eval-batch-size."):
        said = predictions(found.model, found.data)
    kept = [name for name, kind in found.data.features.items() if not _is_binary(kind)]
    if both := sorted(said.keys() & {*kept}):
        allowed = f"a table without a column {both[0]!r}, which is added. Rename that column"
        raise InvalidValue("data", kept, allowed)
    frame: pd.DataFrame = found.data.select_columns(kept).to_pandas() if kept else pd.DataFrame()
    return frame.assign(**{name: list(values) for name, values in said.items()})


def _is_binary(kind: Any) -> bool:
    """Tell whether a column holds pictures or other bytes."""
    return type(kind).__name__ == "Image" or "binary" in str(getattr(kind, "dtype", ""))


def _write(frame: pd.DataFrame, path: Path) -> None:
    with replacing(path) as draft:
        if path.suffix.lower() == ".parquet":
            frame.to_parquet(draft, index=False)
        elif path.suffix.lower() == ".csv":
            frame.to_csv(draft, index=False)
        else:
            frame.to_json(draft, orient="records", lines=True, force_ascii=False)
