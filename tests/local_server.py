"""A small HTTP server on this machine: answers by path, remembers what was asked."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass
class Asked:
    """One request as the server saw it."""

    path: str
    values: dict[str, str]
    headers: dict[str, str]
    body: Any


Answer = tuple[int, bytes | Any]  # status, and bytes or a value to send as JSON


@dataclass
class LocalServer:
    """Answers requests.

    Attributes:
        url: of the server, without a slash at its end.
        routes: path -> answer, or a function that gives one.
        asked: every request.
    """

    url: str
    routes: dict[str, Answer | Callable[[Asked], Answer]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)


@contextlib.contextmanager
def serving() -> Iterator[LocalServer]:
    """Serve until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: Any) -> None:
            parts = urlsplit(self.path)
            values = {key: one[0] for key, one in parse_qs(parts.query).items()}
            asked = Asked(parts.path, values, dict(self.headers), body)
            local.asked.append(asked)
            route = local.routes.get(parts.path, (404, b"nothing here"))
            status, content = route(asked) if callable(route) else route
            sent = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, format: str, *args: Any) -> None:
            """Be quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    local = LocalServer(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield local
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
