"""A tap between a device and its server: TLS ends here, and every byte is passed on and kept.

Nothing in the device's processes is changed. The device believes that the tap is its server,
because the tap has the server's certificate and key.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

HOST = "127.0.0.1"
_END = b"\r\n\r\n"


@dataclass
class Talk:
    """All bytes of one connection, without TLS."""

    sent: bytearray = field(default_factory=bytearray)
    answered: bytearray = field(default_factory=bytearray)


@dataclass(frozen=True)
class Half:
    """A request or an answer: its first line, its headers and its body."""

    first: str
    headers: list[tuple[str, str]]
    body: bytes


@dataclass(frozen=True)
class Call:
    """A request of a device, and the server's answer unless none came."""

    request: Half
    answer: Half | None = None

    @property
    def name(self) -> str:
        """The last part of the path, e.g. ``push-messages``."""
        return self.request.first.split(" ")[1].rpartition("/")[2]


class NotHTTP(ValueError):
    """Bytes that are no request with a length."""


def halves(stream: bytes) -> Iterator[Half]:
    """Cut a stream into requests or answers, so that each byte belongs to one of them."""
    while stream:
        head, end, rest = stream.partition(_END)
        first, *lines = head.decode("ascii").split("\r\n")
        pairs = [line.split(": ", 1) for line in lines]
        headers = [(name.lower(), value) for name, value in pairs]
        length = int(dict(headers).get("content-length", "-1"))
        if not end or length < 0 or len(rest) < length:
            raise NotHTTP(f"{first[:200]!r} with {len(rest)} bytes after its head")
        yield Half(first, headers, rest[:length])
        stream = rest[length:]


def calls_of(talk: Talk) -> list[Call]:
    """Return the calls of a connection, in their order."""
    sent, answered = list(halves(bytes(talk.sent))), list(halves(bytes(talk.answered)))
    assert len(answered) <= len(sent)
    return [
        Call(request, answered[number] if number < len(answered) else None)
        for number, request in enumerate(sent)
    ]


class Tap:
    """Listens on a port of its own and passes all on to a fleet's server.

    Parameters
    ----------
    server : Path
        The server's folder, with its certificate and key.
    port : int
        The server's port.
    """

    def __init__(self, server: Path, port: int) -> None:
        self.talks: list[Talk] = []
        self.port = 0
        self._to = port
        self._here = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._here.load_cert_chain(server / "server.pem", server / "server.key")
        self._there = ssl.create_default_context(cafile=str(server / "ca.pem"))
        self._loop = asyncio.new_event_loop()

    @contextmanager
    def listening(self) -> Iterator[Tap]:
        """Listen until the end of the block."""
        opening = asyncio.start_server(self._serve, HOST, 0, ssl=self._here)
        listener = self._loop.run_until_complete(opening)
        self.port = listener.sockets[0].getsockname()[1]
        thread = Thread(target=self._loop.run_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(listener.close)
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join(10)

    @property
    def calls(self) -> list[Call]:
        """Every call so far, by connection."""
        return [call for talk in self.talks for call in calls_of(talk)]

    @property
    def sent(self) -> bytes:
        """Every byte that came from the device."""
        return b"\n".join(bytes(talk.sent) for talk in self.talks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talk = Talk()
        self.talks.append(talk)
        try:
            onward = await asyncio.open_connection(HOST, self._to, ssl=self._there)
        except OSError:
            writer.close()
            return
        await asyncio.gather(
            _pass_on(reader, onward[1], talk.sent), _pass_on(onward[0], writer, talk.answered)
        )


async def _pass_on(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bytearray
) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            kept += data
            writer.write(data)
            await writer.drain()
    with suppress(OSError):
        writer.close()
