"""serve(): listen, answer until a signal comes, then let what runs finish or keep what it has."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from moss_jt.errors import ConfigError, MossError
from moss_jt.server.app import create_app
from moss_jt.server.calls import ToolRunner
from moss_jt.server.database import Database
from moss_jt.server.keys import has_keys
from moss_jt.server.link import MakeEngine
from moss_jt.server.service import Service
from moss_jt.server.settings import ServerSettings
from moss_jt.server.wire import MAX_HEAD, make_protocol

LAST_S = 10  # after the last answer was ended, for clients to take it


class MossServer(uvicorn.Server):
    """A server that ends in order.

    Args:
        config: uvicorn's.
        service: whose answers are let finish.
        on_listening: called once, when connections are taken.
    """

    def __init__(self, config: uvicorn.Config, service: Service, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._service = service
        self._on_listening = on_listening
        self.failure = ""
        service.on_failure = self._fail

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take connections."""
        await super().startup(sockets)
        if self.started:
            self._on_listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests; what runs has its time, then ends with what it has."""
        self._service.dispatcher.drain()
        grace_s = 0.0 if self.failure else self._service.settings.grace_s
        ending = asyncio.get_running_loop().call_later(grace_s, self._service.dispatcher.end_all)
        await super().shutdown(sockets)
        ending.cancel()

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self.should_exit = True


def serve(
    settings: ServerSettings,
    make_engine: MakeEngine,
    *,
    tools: ToolRunner | None = None,
    on_listening: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve until SIGINT or SIGTERM comes.

    Args:
        settings: how.
        make_engine: makes the engine, in a process of its own.
        tools: that run here.
        on_listening: called with the URL once connections are taken; the model may still be loading.

    Raises:
        ConfigError: the address cannot be used, or is public and there are no keys; or the database cannot be opened.
        MossError: the model cannot be loaded.
    """
    database = Database(settings.database)
    listener = None
    try:
        public = not _is_loopback(settings.host)
        if public and not database.now(has_keys):
            raise ConfigError(
                f"{settings.host} can be reached by others, and there are no keys. Make one first: moss-jt keys add NAME"
            )
        listener = _listen(settings)
        service = Service(settings, database, make_engine, needs_keys=public, tools=tools)
    except BaseException:
        database.close()
        if listener is not None:
            listener.close()
        raise
    address = _url(listener)
    server = make_server(settings, service, lambda: on_listening(address))
    with _signals_end_quietly():
        server.run(sockets=[listener])
    if server.failure:
        raise MossError(server.failure)


def make_server(settings: ServerSettings, service: Service, on_listening: Callable[[], None]) -> MossServer:
    """The server of a service, not yet running."""
    config = uvicorn.Config(
        create_app(service, hosts=frozenset({settings.host})),
        http=make_protocol(settings),
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(max(1, settings.head_s)),
        timeout_graceful_shutdown=int(settings.grace_s) + LAST_S,
        h11_max_incomplete_event_size=MAX_HEAD,
    )
    return MossServer(config, service, on_listening)


def _listen(settings: ServerSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=256)
    except OSError as error:
        raise ConfigError(
            f"{settings.host} port {settings.port} cannot be listened at: {error.strerror or error}. "
            "Give another with --host and --port."
        ) from error


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; a name counts by what it means here."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise ConfigError(f"the host {host!r} is not known: {error.strerror or error}. Give an address.") from error
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


@contextmanager
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
