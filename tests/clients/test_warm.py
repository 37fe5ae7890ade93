"""A device's process that outlives its messages: real processes, real sockets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict

from fedlora_flwr.client_app import app
from fedlora_flwr.clients.device import Device
from fedlora_flwr.clients.trainer import process_trainer
from fedlora_flwr.clients.warm import WarmProcess
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import ClientFailed, InvalidValue, OrderRefused
from fedlora_flwr.privacy.ledger import Account, Ledger
from fedlora_flwr.strategies.replies import to_record
from fedlora_flwr.wire.identity import acting_for
from tests.clients.called import count_others, die, refuse, who

COST = re.compile("seconds|memory")
MakeProcess = Callable[..., WarmProcess]


@pytest.fixture
def make_process(tmp_path: Path) -> MakeProcess:
    def make(made_for: str = "this", seconds: float = 60.0) -> WarmProcess:
        return WarmProcess(tmp_path / "state" / "warm", made_for, seconds)

    return make


def ended(process: int, patience: float = 20.0) -> bool:
    until = time.monotonic() + patience
    while time.monotonic() < until:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        # A child that has ended is there until its parent asks.
        if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_calls_share_one_process_that_ends_when_idle(make_process: MakeProcess) -> None:
    first = make_process(seconds=1.0).call(who)
    assert first != os.getpid()
    assert make_process(seconds=1.0).call(who) == first
    assert ended(first)
    assert make_process(seconds=1.0).call(who) != first


def test_a_process_made_for_something_else_gives_way(make_process: MakeProcess) -> None:
    old = make_process("old").call(who)
    new = make_process("new").call(who)
    assert new != old
    assert ended(old)
    assert make_process("new").call(who) == new


def test_an_error_is_raised_where_the_call_was_made(make_process: MakeProcess) -> None:
    process = make_process()
    before = process.call(who)
    with pytest.raises(InvalidValue, match=r"depth = 1 cannot be used: expected 2\."):
        process.call(refuse, "depth")
    assert process.call(who) == before


def test_a_process_that_is_killed_is_an_error_and_the_next_call_gets_another(
    make_process: MakeProcess,
) -> None:
    process = make_process()
    killed, socket = process.call(who), Path(process.address.read_text())
    with pytest.raises(ClientFailed, match="ended before it answered"):
        process.call(die)
    assert socket.exists()
    assert process.call(who) != killed
    assert not socket.parent.exists()


def test_calls_at_once_start_one_process_and_wait_for_each_other(
    make_process: MakeProcess, tmp_path: Path
) -> None:
    (tmp_path / "marks").mkdir()
    with ThreadPoolExecutor(4) as pool:
        processes = set(pool.map(lambda _: make_process().call(who), range(4)))
        meanwhile = list(
            pool.map(lambda _: make_process().call(count_others, tmp_path / "marks"), range(4))
        )
    assert len(processes) == 1
    assert meanwhile == [0] * 4


def test_only_the_devices_user_can_reach_the_process(make_process: MakeProcess) -> None:
    process = make_process()
    process.call(who)
    folder = Path(process.address.read_text()).parent
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("at_work", [False, True])
def test_it_ends_with_flowers_process_and_leaves_no_socket(tmp_path: Path, at_work: bool) -> None:
    # What starts a caller is, on a device, Flower's SuperExec.
    mark = tmp_path / "mark"
    caller = (
        "import sys; from pathlib import Path; from fedlora_flwr.clients.warm import WarmProcess\n"
        "from tests.clients.called import stay, who\n"
        f"process = WarmProcess(Path({str(tmp_path / 'warm')!r}), 'this', 60.0)\n"
        "print(process.call(who), flush=True)\n"
        f"{at_work} and process.call(stay, Path({str(mark)!r}))"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {caller!r}]); input()"
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as flower:
        assert flower.stdout is not None
        warm = int(flower.stdout.readline())
        while at_work and not mark.exists():
            time.sleep(0.05)
        socket = Path((tmp_path / "warm").read_text())
        assert socket.exists()
        flower.kill()
    assert ended(warm)
    assert not socket.parent.exists()


@pytest.fixture
def device(tmp_path: Path) -> Path:
    file = tmp_path / "device" / "device.toml"
    file.parent.mkdir()
    file.write_text(
        'client-id = "home"\ntask = "digits"\n'
        'epsilon = 8.0\ndelta = 1e-4\nkeep-warm = 60\nstate-dir = "state"\n'
        "reproducible = true\n"
    )
    return file


def train(device: Path, run: RunConfig, server_round: int, plan: str = "*") -> Message:
    """Ask the app to train, as Flower's process on the device does."""
    config = Device.read(device).config(run.items())
    start = process_trainer(config).start
    asked = ConfigRecord({"plan": plan, "server-round": server_round})
    content = RecordDict({"arrays": to_record(start), "config": asked})
    with acting_for(77, 2):
        message = Message(content, 2, MessageType.TRAIN)
        context = Context(77, 2, {"device": str(device)}, RecordDict(), run.items())
        return app(message, context)


def content(reply: Message) -> dict[str, object]:
    """Return all that a reply says but what it took of its process."""
    found: dict[str, object] = {}
    for record in reply.content.array_records.values():
        found |= {name: array.numpy().tobytes() for name, array in record.items()}
    for metrics in reply.content.metric_records.values():
        found |= {name: value for name, value in metrics.items() if not COST.search(name)}
    return found


def copy_of(device: Path, name: str, **changes: object) -> Path:
    """Set up a device with the same client and other settings, and with a ledger of its own."""
    file = device.parent.with_name(name) / "device.toml"
    file.parent.mkdir()
    text = device.read_text()
    for key, value in changes.items():
        key = key.replace("_", "-")
        text = re.sub(f"(?m)^{key} = .*$", f"{key} = {value}", text)
    file.write_text(text)
    return file


def spent(device: Path) -> int:
    """Return the rows of a device's ledger."""
    config = Device.read(device).config(RUN.items())
    account = Account("home", "77", config.epsilon, config.delta)
    steps = Ledger(device.parent / "state" / "ledger.sqlite").summary(account).steps
    return steps // RUN.local_steps


RUN = RunConfig.of({"num-rounds": 3, "local-steps": 2, "reproducible": True})


def test_a_warm_device_sends_what_a_cold_one_sends(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("fedlora_flwr.client_app.make_client", None)  # Not in this process.
        warm = [content(train(device, RUN, server_round)) for server_round in (1, 2)]
    cold_device, cold = copy_of(device, "cold", keep_warm=0), []
    for server_round in (1, 2):
        process_trainer.cache_clear()
        cold.append(content(train(cold_device, RUN, server_round)))
    assert warm == cold
    assert warm[0] != warm[1]
    assert spent(device) == spent(cold_device) == 2


def test_a_warm_devices_refusal_is_its_cold_ones(device: Path) -> None:
    said = []
    for file in (device, copy_of(device, "cold", keep_warm=0)):
        with pytest.raises(OrderRefused) as refusal:
            train(file, RUN, 1, plan="AB" * 40)
        said.append(str(refusal.value))
        assert spent(file) == 0
    assert said[0] == said[1]


def test_what_a_devices_file_says_now_is_in_force(device: Path) -> None:
    before = content(train(device, RUN, 1))
    device.write_text(device.read_text().replace("epsilon = 8.0", "epsilon = 9.0"))
    after = content(train(device, RUN, 2))
    assert before["epsilon-budget"] == 8.0
    assert after["epsilon-budget"] == 9.0


@pytest.mark.parametrize("value", ["-1", '"long"', "true"])
def test_a_time_that_is_none_is_refused(device: Path, value: str) -> None:
    device.write_text(device.read_text().replace("keep-warm = 60", f"keep-warm = {value}"))
    with pytest.raises(InvalidValue, match=r"keep-warm = .* expected seconds"):
        Device.read(device)


def test_a_process_is_made_for_the_files_that_it_has_read(device: Path) -> None:
    records = device.parent / "records"
    records.mkdir()
    (records / "train.jsonl").write_text("{}")
    device.write_text(device.read_text() + 'dataset = "records"\n')

    def made_for() -> str:
        return WarmProcess.of(Device.read(device), device).made_for

    first = made_for()
    assert made_for() == first
    (records / "more.jsonl").write_text("{}")
    second = made_for()
    assert second != first
    device.write_text(device.read_text() + "# Another text.\n")
    assert made_for() not in {first, second}


def test_the_server_does_not_learn_names_of_files(device: Path) -> None:
    records = device.parent / "records"
    records.mkdir()
    (records / "ward-7.jsonl").symlink_to(device.parent / "gone")
    device.write_text(device.read_text() + 'dataset = "records"\n')
    content = RecordDict({"config": ConfigRecord({"server-round": 1})})
    with acting_for(77, 2), pytest.raises(ClientFailed, match=r"^The client could not do what"):
        app(
            Message(content, 2, MessageType.TRAIN),
            Context(77, 2, {"device": str(device)}, RecordDict(), RUN.items()),
        )
