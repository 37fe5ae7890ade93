"""A run's report as a page that reloads itself, for this machine alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from fedlora_flwr.report.page import run_report
from fedlora_flwr.server.report import facts_of
from fedlora_flwr.server.run_dir import RunDirectory

RELOAD = 5
"""Seconds between two loads of a page whose run has not ended."""


@contextmanager
def serving(run_dir: RunDirectory, port: int = 0) -> Iterator[str]:
    """Serve a run's report on 127.0.0.1 while the block runs; yield its address.

    Parameters
    ----------
    run_dir : RunDirectory
        The run's folder.
    port : int (default: 0)
        The port; 0 takes a free one.

    Raises
    ------
    OSError
        The port is in use.
    """
    server = _Server(("127.0.0.1", port), _Page)
    server.run_dir = run_dir
    thread = Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    run_dir: RunDirectory


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
            facts = facts_of(self.server.run_dir)
            reload = None if facts.summary else RELOAD
            content = run_report(facts, reload).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Leave the terminal to the run."""
