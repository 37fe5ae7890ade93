"""What a device is told where no server admits it; `test_refused` asks a real SuperLink."""

from __future__ import annotations

import pickle
import shutil
import socket
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from threading import Thread

import pytest

from fedlora_flwr.deploy import identities
from fedlora_flwr.deploy.admission import Caller, NoAnswer, NotAdmitted
from fedlora_flwr.deploy.fleet import Fleet, make_fleet
from fedlora_flwr.deploy.flower import NotSealed
from fedlora_flwr.deploy.supernode import arguments_of
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.simulations.superlink import free_port
from tests.deploy.support import answer_once

Change = Callable[[Path], None]


def device_of(fleet: Path) -> Path:
    return fleet / "devices" / "device-01"


def caller(fleet: Path, address: str) -> Caller:
    return Caller(address, device_of(fleet) / "ca.pem", device_of(fleet) / "device.key")


def at(address: tuple[str, int]) -> str:
    return "{}:{}".format(*address)


def test_a_start_script_names_server_authority_and_key(fleet: Path) -> None:
    device = device_of(fleet)
    found = Caller.of(arguments_of(device / "start.sh"), device)
    assert found is not None
    assert found == caller(fleet, found.address)
    assert found.address.startswith("127.0.0.1:")
    assert Caller.of(["--insecure", "--port", "1"], device) is None
    with pytest.raises(InvalidValue, match="--superlink: expected one argument"):
        Caller.of(["--superlink"], device)


def test_a_script_that_no_shell_could_read_is_named(fleet: Path) -> None:
    script = device_of(fleet) / "start.sh"
    script.write_text(script.read_text() + '"')
    script.write_text(script.read_text().replace('device.toml\\""', 'device.toml\\"'))
    with pytest.raises(NotSealed, match=r"in start\.sh cannot be read"):
        arguments_of(script)


def test_an_address_where_nothing_answers_is_named(fleet: Path) -> None:
    with pytest.raises(NoAnswer) as caught:
        caller(fleet, f"127.0.0.1:{free_port()}").ask()
    text = str(caught.value)
    assert text.startswith("Nothing answers at 127.0.0.1:")
    assert "Connection refused" in text
    assert "start the server, or compare host and port with those after --superlink" in text
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (NoAnswer, text)
    with pytest.raises(NoAnswer, match=r"Nothing answers at no-such-name\.invalid:1"):
        caller(fleet, "no-such-name.invalid:1").ask()
    with pytest.raises(NotAdmitted, match="is not a SuperLink"):
        caller(fleet, "127.0.0.1:port").ask()


def test_a_port_of_another_service_is_named(fleet: Path) -> None:
    def greet() -> None:
        with closing(listener.accept()[0]) as connection:
            connection.sendall(b"220 mail.example.org ready\r\n" * 20)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        Thread(target=greet, daemon=True).start()
        with pytest.raises(
            NotAdmitted, match="answers, but does not speak TLS as a SuperLink does"
        ):
            caller(fleet, at(listener.getsockname())).ask()
    # It has the fleet's certificate, and speaks something else.
    with pytest.raises(NotAdmitted, match="is not a SuperLink of this version"):
        caller(fleet, at(answer_once(fleet / "server", 0))).ask()


def another(fleet: Path) -> None:
    make_fleet(fleet.parent / "other", Fleet(1))
    shutil.copy(fleet.parent / "other" / "server" / "ca.pem", device_of(fleet))


def from_tomorrow(fleet: Path) -> None:
    server = fleet / "server"
    (server / "server.key").unlink()
    identities.make_certificates(server, "127.0.0.1", 2)
    shutil.copy(server / "ca.pem", device_of(fleet))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (another, r"is not signed by the authority of ca\.pem \(.*copy the fleet's ca\.pem from"),
        (
            from_tomorrow,
            r"is not valid yet by this device's clock \(.* it is valid from .*set this.*renew",
        ),
    ],
)
def test_a_certificate_that_cannot_be_trusted_says_why(
    fleet: Path, change: Change, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identities, "_EARLIER", timedelta(days=-1))
    change(fleet)
    address = at(answer_once(fleet / "server", 0, times=2))  # Its dates are looked at once more.
    with pytest.raises(NotAdmitted, match=said):
        caller(fleet, address).ask()


def test_a_certificate_for_another_name_says_so(fleet: Path) -> None:
    _, port = answer_once(fleet / "server", 0, host="127.0.0.2")
    with pytest.raises(NotAdmitted, match=r"is for another name \(IP address mismatch"):
        caller(fleet, f"127.0.0.2:{port}").ask()


@pytest.mark.parametrize("name", ["device.key", "ca.pem"])
@pytest.mark.parametrize("content", [None, "no key"])
def test_a_file_that_cannot_be_read_is_named(fleet: Path, name: str, content: str | None) -> None:
    file = device_of(fleet) / name
    file.unlink()
    if content:
        file.write_text(content)
    with pytest.raises(NotAdmitted, match=rf"device-01/{name} cannot be read \(.*take it from"):
        caller(fleet, "127.0.0.1:1").ask()
