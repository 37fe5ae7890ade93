"""A report as a page that reloads itself, for this machine alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

RELOAD = 5
"""Seconds between two loads of a page whose work has not ended."""


@contextmanager
def serving(page: Callable[[], str], port: int = 0) -> Iterator[str]:
    """Serve a report on 127.0.0.1 while the block runs; yield its address.

    Parameters
    ----------
    page : callable
        Returns the report as it is now, an HTML document.
    port : int (default: 0)
        The port; 0 takes a free one.

    Raises
    ------
    OSError
        The port is in use.
    """
    server = _Server(("127.0.0.1", port), _Page)
    server.page = page
    thread = Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    page: Callable[[], str]


class _Page(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        """Answer with the report as it is now."""
        port = self.server.server_port
        # A page of another site could have its own name resolve to this machine.
        if self.headers.get("Host") not in (f"127.0.0.1:{port}", f"localhost:{port}"):
            self.send_error(403)
        elif self.path != "/":
            self.send_error(404)
        else:
            content = self.server.page().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Leave the terminal to the run."""
