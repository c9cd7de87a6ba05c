"""uvicorn's HTTP/1.1, with an end to connections that never say what they want or never take what they asked for."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

from moss_jt.server.settings import ServerSettings

MAX_HEAD = 32 << 10  # bytes of a request's first lines


def make_protocol(settings: ServerSettings) -> type[asyncio.Protocol]:
    """The class of a connection, held to the times of the settings."""

    class Wire(H11Protocol):
        """A connection that is cut where no request comes in time, or no byte of the answer is taken."""

        _head: asyncio.TimerHandle | None = None  # runs while a request is awaited
        _stuck: asyncio.TimerHandle | None = None  # runs while nothing can be written

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """Take a connection, and begin to wait for a request."""
            if len(self.connections) >= settings.connections:
                transport.abort()
            super().connection_made(transport)
            self._head = self.loop.call_later(settings.head_s, self._cut)

        def connection_lost(self, exc: Exception | None) -> None:
            """Stop the clocks."""
            self._stop_clocks()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """Take bytes; once they are a request, its own limits of time hold."""
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                if self._head is not None:
                    self._head.cancel()
                    self._head = None
            elif self._head is None:
                self._head = self.loop.call_later(settings.head_s, self._cut)

        def pause_writing(self) -> None:
            """The client takes nothing: it has some time to begin again."""
            super().pause_writing()
            self._stuck = self.loop.call_later(settings.send_s, self._cut)

        def resume_writing(self) -> None:
            """It takes bytes again."""
            if self._stuck is not None:
                self._stuck.cancel()
            super().resume_writing()

        def _stop_clocks(self) -> None:
            for clock in (self._head, self._stuck):
                if clock is not None:
                    clock.cancel()

        def _cut(self) -> None:
            self.transport.abort()

    return cast("type[Any]", Wire)
