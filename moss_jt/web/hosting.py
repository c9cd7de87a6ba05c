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

GRADIO_VARIABLES = {  # Gradio reads these when it is imported and when a page is made; who serves one sets them
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_ANALYTICS_MAX_EVENTS": "1",
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(1 << 60),  # else pandas sums up all events after each of them
}
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


def reaches_others(host: str) -> bool:
    """Whether others can reach what listens at an address; a name counts by what it means here.

    Raises:
        ConfigError: the name means nothing.
    """
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise ConfigError(f"the host {host!r} is not known: {error.strerror or error}. Give an address.") from error
    return not all(is_local(address.partition("%")[0]) for address in found)


class PageServer(uvicorn.Server):
    """A page at an address; `run` serves it until SIGINT or SIGTERM comes.

    Args:
        app: the page.
        host: where to listen.
        port: 0 takes a free one.
        guarded: visitors log in, so that the page may be asked under any name.
        on_listening: called with the address once connections are taken.
        on_end: called once at the end, to end what keeps connections open.

    Raises:
        ConfigError: the address cannot be had.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str,
        port: int,
        guarded: bool = False,
        on_listening: Callable[[str], None] = lambda _: None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._listener = _listen(host, port)
        self._on_listening = on_listening
        self._on_end = on_end
        hosts = None if guarded else frozenset({host})
        super().__init__(
            uvicorn.Config(
                Gate(app, hosts),
                loop="asyncio",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=LAST_S,
            )
        )

    @property
    def url(self) -> str:
        """The address as a browser takes it."""
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take connections."""
        await super().startup(sockets)
        if self.started:
            self._on_listening(self.url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, end what runs."""
        self._on_end()
        await super().shutdown(sockets)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer until told to end."""
        with _signals_end_quietly():
            asyncio.run(self.serve(sockets=sockets or [self._listener]))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ConfigError(
            f"{host} port {port} cannot be listened at: {error.strerror or error}. Give another with --host and --port."
        ) from error


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
