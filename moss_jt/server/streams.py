"""Answers that come bit by bit, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moss_jt.server.refusals import Refusal

T = TypeVar("T")

HEARTBEAT_S = 15.0
DONE = b"data: [DONE]\n\n"
_BREAKS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}  # JSON leaves them; many readers end a line there


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def sse(values: Mapping[str, Any]) -> bytes:
    """An event of a stream, on one line whatever a reader takes for the end of one."""
    text = json.dumps(values, ensure_ascii=False, allow_nan=False).translate(_BREAKS)
    return b"data: " + text.encode() + b"\n\n"


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do something for as long as the client is there.

    Raises:
        ClientGone: it has gone, and the work was cancelled.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        await _end(task, gone)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what still runs, and wait until it has cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def merge(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """What several streams give, as it comes, with the number of the stream; an error of one ends all."""
    if len(sources) == 1:
        async with contextlib.aclosing(sources[0]) as only:
            async for value in only:
                yield 0, value
        return
    inbox: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue()

    async def feed(number: int, source: AsyncGenerator[T, None]) -> None:
        try:
            async with contextlib.aclosing(source) as values:
                async for value in values:
                    inbox.put_nowait((number, value))
        except Exception as error:  # handed to who waits below
            inbox.put_nowait(error)
        else:
            inbox.put_nowait(None)

    tasks = [asyncio.ensure_future(feed(number, source)) for number, source in enumerate(sources)]
    try:
        left = len(tasks)
        while left:
            got = await inbox.get()
            if isinstance(got, BaseException):
                raise got
            if got is None:
                left -= 1
            else:
                yield got
    finally:
        await _end(*tasks)


class EventStream(Response):
    """Server-sent events. Ends the work when the client goes away.

    Args:
        first: what has come already, so that an error before it could have its status.
        rest: what is still to come; closed at the end.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the end of them, or of the client."""
        sending = asyncio.ensure_future(self._send_all(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            await _end(sending, gone)

    async def _send_all(self, send: Send) -> None:
        async def put(body: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await put(self._first)
        async with contextlib.aclosing(self._rest) as rest:
            try:
                async for chunk in _with_heartbeats(rest):
                    await put(chunk)
            except Refusal as refusal:
                await put(sse(refusal.body()))
        await put(b"", more=False)


async def _with_heartbeats(source: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """A comment now and then where nothing else comes: proxies close what is silent."""
    while True:
        waiting = asyncio.ensure_future(_next(source))
        try:
            while not (await asyncio.wait({waiting}, timeout=HEARTBEAT_S))[0]:
                yield b": waiting\n\n"
        finally:
            if not waiting.done():
                await _end(waiting)
        chunk = waiting.result()
        if chunk is None:
            return
        yield chunk


async def _next(source: AsyncGenerator[bytes, None]) -> bytes | None:
    return await anext(source, None)


async def event_stream(request: Request, source: AsyncGenerator[bytes, None]) -> EventStream:
    """A response of events, once the first has come; an error before it is raised, and has its own status.

    Raises:
        ClientGone: before anything came.
    """
    first = await until_gone(request, _next(source))
    return EventStream(first or b"", source)
