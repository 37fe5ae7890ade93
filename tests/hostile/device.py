"""A device as its SuperNode runs it: the shipped client app, its own file, and every check.

`Device.ask` sends one message and asserts, from outside, all that must hold whatever is sent.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sqlite3
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

import fedlora_flwr.clients.numpy_client  # noqa: F401 - what it imports is not the message's doing
from fedlora_flwr.client_app import app
from fedlora_flwr.config.names import by_short_name
from fedlora_flwr.wire.identity import acting_for
from tests.hostile import allowed
from tests.hostile.canaries import CANARY, Builder
from tests.hostile.recorder import Event, Recorder, Tripwire
from tests.hostile.tiny_task import CLASSES, FEATURES, NAME, READS, points

ROOT = Path(__file__).parents[2]
EPSILON, DELTA, CLIENT = 7.3219, 0.0123457, "kitchen-4711"
SHAPES: dict[str, tuple[int, ...]] = {
    **{
        f"blocks.{i}.fc.lora_{factor}.weight": shape
        for i in range(2)
        for factor, shape in (("A", (-1, FEATURES)), ("B", (FEATURES, -1)))
    },
    "head.weight": (CLASSES, FEATURES),
    "head.bias": (CLASSES,),
}
# What a device that keeps its process does besides: starts it, reaches it, reads what it answers.
_OF_WARM = {
    "subprocess.Popen": "'fedlora_flwr.clients.warm'",
    "socket.connect": r"'[^']*/pymp-\w+/listener-\w+'",
    "pickle.find_class": r"^\('(flwr\.app|fedlora_flwr\.(wire\.arrays|errors)|numpy|collections)\b",
}
# Tests may have their folders in /dev/shm, so what is there is no part of the system.
_ROOTS = (
    "/proc",
    "/sys",
    "/dev/null",
    "/dev/urandom",
    "/etc",
    "/usr",
    "/lib",
    "/run",
    "/nonexistent",
)


def shipped_settings() -> dict[str, Any]:
    """Return the app's own run configuration, from its pyproject.toml, by short names."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return by_short_name(content["tool"]["flwr"]["app"]["config"])


RUN: dict[str, Any] = {
    **shipped_settings(), "task": NAME, "batch-size": 4, "local-steps": 1, "num-rounds": 6,
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What leaves the device after a message."""

    kind: str
    """"ok", "budget-exhausted", "refused", "failed" or "exhausted"."""
    reason: str = ""
    content: RecordDict = field(default_factory=RecordDict)

    @property
    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        return {
            name: array.numpy()
            for record in self.content.array_records.values()
            for name, array in record.items()
        }

    @property
    def numbers(self) -> dict[str, Any]:
        return dict(self.content.metric_records["metrics"])


def _parts(word: str, length: int = 5) -> list[str]:
    return [word[start : start + length] for start in range(len(word) - length + 1)]


class Outside:
    """Folders that no message may reach, with bait in them."""

    def __init__(self, folder: Path) -> None:
        # Python lists each folder of its path when something is imported; it opens nothing there.
        self.modules, self.mark = folder / "modules", folder / "it-ran"
        self.modules.mkdir(parents=True)
        self.folder = folder = folder / "bait"
        (folder / "model").mkdir(parents=True)
        for name in ("train", "validation", "test"):
            (folder / f"{name}.jsonl").write_text('{"text": "bait", "label": 0}\n')
            np.save(folder / f"{name}.npy", points(9))
        (folder / "model" / "config.json").write_text('{"model_type": "bert"}')
        (self.modules / "bait_task.py").write_text(
            f"from pathlib import Path\nPath({str(self.mark)!r}).touch()\nmake = dict\n"
        )
        self.wire = Tripwire(folder, folder / "model")

    def check(self) -> None:
        assert not self.mark.exists(), "a server's code ran on the device"
        assert "bait_task" not in sys.modules
        touched = self.wire.touched()
        assert not touched, f"the device touched {touched}"


class Device:
    """A device of the tiny task, or of a task of the package.

    Parameters
    ----------
    folder : Path
        Its own, new.
    outside : Outside
        What it must not touch.
    settings : Any
        Further lines of its file.
    """

    def __init__(self, folder: Path, outside: Outside, **settings: Any) -> None:
        folder.mkdir(parents=True)
        self.folder, self.outside = folder, outside
        self.file, self.state = folder / "device.toml", folder / "state"
        build: Builder | None = settings.pop("build", None)
        if build is None:
            np.save(folder / "records.npy", settings.pop("records", points(1)))
            np.save(folder / "public.npy", points(2, 12))
        planted = {} if build is None else build(folder).settings
        own: dict[str, Any] = {
            "client-id": CLIENT, "task": NAME, "dataset": "records.npy", "state-dir": "state",
            "epsilon": EPSILON, "delta": DELTA, "device": "cpu",
        }  # fmt: skip
        own |= {key.replace("_", "-"): value for key, value in settings.items()}
        limits = own.pop("limits", {})
        own |= {key: value for key, value in planted.items() if key not in ("test-split",)}
        if "test-split" in own and "test-split" in planted:
            own["test-split"] = planted["test-split"]
        self.own = own
        text = "".join(f"{key} = {_toml(value)}\n" for key, value in own.items())
        text += "[limits]\n" + "".join(f"{key} = {_toml(v)}\n" for key, v in limits.items())
        self.file.write_text(text)
        self.public = allowed.Public(
            str(own["client-id"]), float(own["epsilon"]), float(own["delta"]), SHAPES, 2,
            frozenset({"loss", "accuracy"}) if "test-split" in own else frozenset(),
            own.get("weighting", "uniform"),
        )  # fmt: skip
        self.secret = [str(folder), "records.npy", *_parts(CANARY)]
        # A reply that holds an account states the budget, and says whose it is. No error does.
        self.account = [str(own["client-id"]), repr(own["epsilon"]), repr(own["delta"])]
        self.run = {**RUN, "task": own["task"]}
        """The run that messages are of, unless they say otherwise."""
        self.warm = False
        """Whether it may start a process of its own and talk to it."""
        self.inside = [folder]
        """Folders that are the device's."""
        self.sent = 0
        self.kinds: dict[str, int] = {}
        self._rows_at_batch: list[int] = []

    def rows(self) -> list[dict[str, Any]]:
        """Return the ledger's rows, read with SQLite alone."""
        path = self.state / "ledger.sqlite"
        if not path.exists():
            return []
        db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            db.row_factory = sqlite3.Row
            return [dict(row) for row in db.execute("SELECT * FROM releases ORDER BY id")]
        finally:
            db.close()

    def ask(
        self,
        kind: str = "train",
        content: RecordDict | None = None,
        run: Mapping[str, Any] | None = None,
        run_id: int = 7,
    ) -> Answer:
        """Send a message, check everything, and return what left the device."""
        content = RecordDict() if content is None else content
        message, context = _message(content, kind, run_id), self._context(run or self.run, run_id)
        rows, opened, batches = len(self.rows()), READS.opened, READS.batches
        self._rows_at_batch = []
        with self._watching() as events:
            answer = self._answer(message, context, kind)
        self.sent += 1
        self.kinds[answer.kind] = self.kinds.get(answer.kind, 0) + 1
        written = len(self.rows()) - rows
        self._check_ledger(answer, written, rows, READS.batches - batches, kind)
        if answer.kind == "refused":
            assert READS.opened == opened, "a record was opened for a refused order"
            assert READS.batches == batches
        self._check_events(events)
        self.outside.check()
        assert not context.state, "the client keeps something in Flower's context"
        return answer

    def order(self, arrays: Mapping[str, Any] | None = None, /, **config: Any) -> RecordDict:
        """Return a message's content; keys with underscores, and the model's start by default."""
        keys = {key.replace("_", "-"): value for key, value in config.items()}
        return records(start(4) if arrays is None else arrays, keys)

    def _context(self, run: Mapping[str, Any], run_id: int) -> Context:
        return Context(run_id, 1, {"device": str(self.file)}, RecordDict(), dict(run))

    def _answer(self, message: Message, context: Context, kind: str) -> Answer:
        try:
            with acting_for(context.run_id):
                reply = app(message, context)
        except Exception as error:  # As Flower's client process does, in the same words.
            reason = str(type(error)) + ":<'" + str(error) + "'>"
            return Answer(allowed.check_error(reason, [*self.secret, *self.account]), reason)
        assert not reply.has_error()
        content, public = reply.content, self.public
        allowed.check_private(_everything(content), self.secret)
        legacy = any(name.startswith(("fitres", "evaluateres")) for name in content)
        status = "ok"
        if kind == "query":
            allowed.check_query(content, public)
        elif kind == "train":
            check = allowed.check_legacy_training if legacy else allowed.check_training
            status = check(content, public)
        elif kind == "evaluate":
            (allowed.check_legacy_figures if legacy else allowed.check_figures)(content, public)
        elif kind == "get_parameters":
            allowed.check_start(content, public)
        elif kind == "get_properties":
            allowed.check_properties(content)
        else:
            raise AssertionError(f"a message of kind {kind!r} was answered: {content}")
        return Answer(status, content=content)

    def _check_ledger(
        self, answer: Answer, written: int, before: int, batches: int, kind: str
    ) -> None:
        released = kind == "train" and answer.kind == "ok"
        if released or (kind == "train" and batches):
            assert written == 1, f"{answer} with {written} rows"
            assert set(self._rows_at_batch) <= {before + 1}, "a batch was read before its row"
            row = self.rows()[-1]
            assert row["client"] == self.public.client
            assert row["noise_multiplier"] > 0 or self.public.epsilon == float("inf")
        elif answer.kind in ("refused", "exhausted", "budget-exhausted") or kind != "train":
            assert written == 0, f"{answer} with {written} rows"
        else:
            assert written in (0, 1)

    def _check_events(self, events: list[Event]) -> None:
        inside = tuple(str(place.resolve()) for place in (*self.inside, _cache()))
        for kind, what, writes in events:
            if kind == "import":
                assert what.split(".")[0] != "bait_task", "a server chose what is imported"
            elif self.warm and kind in _OF_WARM:
                assert re.search(_OF_WARM[kind], what), what
            elif kind != "os.listdir" or what not in map(os.path.realpath, sys.path):
                assert _may(what, writes, inside), f"{kind} {what} (writes: {writes})"

    @contextmanager
    def _watching(self) -> Iterator[list[Event]]:
        recorder = Recorder.of_process()

        def note() -> None:
            with recorder.paused():
                self._rows_at_batch.append(len(self.rows()))

        with recorder.recording() as events:
            READS.on_batch.append(note)
            try:
                yield events
            finally:
                READS.on_batch.remove(note)


def start(rank: int, seed: int = 5) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Return arrays that fit the tiny model."""
    draw = np.random.default_rng(seed)
    return {
        name: draw.normal(scale=0.3, size=[rank if n == -1 else n for n in shape]).astype("f4")
        for name, shape in SHAPES.items()
    }


def records(arrays: Mapping[str, Any], config: Mapping[str, Any]) -> RecordDict:
    """Return a message's content, in the records that a Message-API strategy sends."""
    record = ArrayRecord({name: _array(value) for name, value in arrays.items()})
    return RecordDict({"arrays": record, "config": ConfigRecord(dict(config))})


def _array(value: Any) -> Any:
    return value if isinstance(value, Array) else Array(np.asarray(value))


def _message(content: RecordDict, kind: str, run_id: int) -> Message:
    """Make a message of any kind, also one that Flower's own constructor would refuse."""
    with acting_for(run_id):
        message = Message(content, 1, "train")
    message.metadata.__dict__["_message_type"] = kind
    return message


def _everything(content: RecordDict) -> str:
    """Return all that a reply holds, arrays as their bytes, as one text."""
    parts = []
    for name, record in content.items():
        parts.append(name)
        for key, value in record.items():
            held = value.data.decode("latin-1") if hasattr(value, "data") else repr(value)
            parts += [key, held]
    return "\n".join(parts)


def _may(path: str, writes: bool, inside: tuple[str, ...]) -> bool:
    if path.startswith(inside):
        return True
    if Path(path).name.startswith("<"):  # Where a traceback has no file.
        return not writes
    of_code = path.startswith(_code())
    if writes:
        return path == "/dev/null" or (of_code and "/__pycache__/" in path)
    return of_code or path.startswith(_ROOTS)


def _toml(value: Any) -> str:
    if value == float("inf"):
        return "inf"
    return json.dumps(value)


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(base).expanduser() / "fedlora").resolve()


@functools.cache
def _code() -> tuple[str, ...]:
    """Return the folders of installed code, and of this repository's."""
    places = {sys.prefix, sys.base_prefix, str(ROOT / "fedlora_flwr"), str(ROOT / "tests")}
    assert not any(place == tempfile.gettempdir() for place in places)
    return tuple(os.path.realpath(place) for place in places)
