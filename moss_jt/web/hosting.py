"""A page at an address: whom it answers, what a browser may load from it, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moss_jt.errors import ConfigError

LAST_S = 3  # for open connections at the end
_HEADERS = {
    # Gradio writes scripts and styles into the page itself; but nothing may come from elsewhere or go there
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Gate:
    """Stands before a page.

    Args:
        app: the page.
        hosts: the names that it may be asked by; None for any, where visitors log in.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through with our headers on its answer, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        if self._is_of_another_site(Headers(scope=scope)):
            refusal = PlainTextResponse("This page answers only under its own name.", 403)
            await refusal(scope, receive, send_guarded)
            return
        await self._app(scope, receive, send_guarded)

    def _is_of_another_site(self, headers: Headers) -> bool:
        """Whether another site may have made a browser ask: by its name, or from its own pages."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return True
        return self._hosts is not None and not self._is_known(host)

    def _is_known(self, host: str) -> bool:
        name = urlsplit(f"//{host}").hostname or ""
        return is_local(name) or name in (self._hosts or ())


def is_local(name: str) -> bool:
    """Whether a name or an address means this machine alone."""
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """Take an address.

    Raises:
        ConfigError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ConfigError(
            f"{host} port {port} cannot be listened at: {error.strerror or error}. Give another with --host and --port."
        ) from error


def url_of(listener: socket.socket) -> str:
    """The address as a browser takes it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def host_page(
    app: ASGIApp,
    listener: socket.socket,
    *,
    hosts: frozenset[str] | None,
    on_end: Callable[[], None] = lambda: None,
) -> PageServer:
    """The server of a page, not yet running: `run` it until SIGINT or SIGTERM comes.

    Args:
        app: the page.
        listener: where.
        hosts: see Gate.
        on_end: called once when it ends, to end what keeps connections open.
    """
    config = uvicorn.Config(
        Gate(app, hosts),
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=LAST_S,
    )
    return PageServer(config, listener, on_end)


class PageServer(uvicorn.Server):
    """A page that is served."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket, on_end: Callable[[], None]) -> None:
        super().__init__(config)
        self._listener = listener
        self._on_end = on_end

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, end what runs."""
        self._on_end()
        await super().shutdown(sockets)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer until told to end."""
        with _signals_end_quietly():
            asyncio.run(self.serve(sockets=sockets or [self._listener]))


@contextlib.contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """uvicorn raises the signal again that ended it; by then all is in order, and nothing more need happen."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
