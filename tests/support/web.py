"""A web server on loopback that serves a folder and fails where it is told to."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# A fault is the status of an error, or one of these:
CUT = "cut"  # half of the announced bytes, then the end
SILENT = "silent"  # accepts the connection and never answers
STUCK = "stuck"  # half of the announced bytes, then nothing
WRONG = "wrong"  # the right number of wrong bytes


class Web(ThreadingHTTPServer):
    """Serves `folder`; the next requests of a file meet its `faults` in turn, all of them those of `always`."""

    daemon_threads = True

    def __init__(self, folder: Path, query: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.query = folder, query
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.faults: defaultdict[str, list[int | str]] = defaultdict(list)
        self.always: dict[str, int | str] = {}
        self.requests: Counter[str] = Counter()
        self.is_stuck = threading.Event()
        self.is_over = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        path, _, query = self.path.removeprefix("/").partition("?")
        self.server.requests[path] += 1
        faults = self.server.faults[path]
        fault = faults.pop(0) if faults else self.server.always.get(path)
        file = self.server.folder / path
        if fault == SILENT:
            self.server.is_over.wait()
        elif isinstance(fault, int):
            self.send_error(fault)
        elif query != self.server.query:
            self.send_error(403)
        elif not file.is_file():
            self.send_error(404)
        else:
            self._send(file.read_bytes(), fault)

    def _send(self, content: bytes, fault: str | None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault == WRONG:
            content = content[::-1]
        self.wfile.write(content[: len(content) // 2] if fault in (CUT, STUCK) else content)
        if fault == STUCK:
            self.wfile.flush()
            self.server.is_stuck.set()
            self.server.is_over.wait()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing to the terminal."""


@contextmanager
def serving(folder: Path, query: str = "") -> Iterator[Web]:
    """A server of `folder` for as long as the context lasts."""
    with Web(folder, query) as web:
        thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield web
        finally:
            web.is_over.set()
            web.shutdown()
            thread.join()
