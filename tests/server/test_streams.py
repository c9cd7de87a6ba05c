"""Streams joined, kept awake, and ended with who reads them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.requests import Request

from moss_jt.server import streams
from moss_jt.server.refusals import Refusal
from moss_jt.server.streams import ClientGone, EventStream, event_stream, merge, sse, until_gone

Messages = list[dict[str, Any]]


class Source:
    """Gives numbers, waits where told, remembers that it was closed."""

    def __init__(self, *values: object) -> None:
        self.values = values
        self.closed = False
        self.gate = asyncio.Event()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        try:
            for value in self.values:
                if value is None:
                    await self.gate.wait()
                elif isinstance(value, Exception):
                    raise value
                else:
                    yield str(value).encode()
        finally:
            self.closed = True


def request_of(receive: Any) -> Request:
    """A request whose client says what `receive` gives."""
    return Request({"type": "http", "method": "POST", "headers": [], "path": "/"}, receive)


async def stays() -> dict[str, Any]:
    """A client that stays."""
    await asyncio.Event().wait()
    raise AssertionError


async def goes() -> dict[str, Any]:
    """A client that has gone."""
    return {"type": "http.disconnect"}


async def sent_by(response: EventStream, receive: Any) -> bytes:
    """The body that goes to the client."""
    body = b""

    async def send(message: Any) -> None:
        nonlocal body
        body += message.get("body", b"")

    await response({"type": "http"}, receive, send)
    return body


def test_an_event_is_one_line_for_every_reader() -> None:
    """U+2028 in an answer ended the line for str.splitlines, and so for httpx and what is built on it."""
    values = {"text": "".join(map(chr, range(0x3000)))}
    line, *rest = sse(values).decode().splitlines()
    assert rest == [""]
    assert json.loads(line.removeprefix("data: ")) == values


def test_all_of_several_streams_come_with_their_number() -> None:
    async def run() -> list[tuple[int, bytes]]:
        sources = [Source("a", "b"), Source("c"), Source()]
        found = [pair async for pair in merge([source.chunks() for source in sources])]
        assert all(source.closed for source in sources)
        return found

    assert sorted(asyncio.run(run())) == [(0, b"a"), (0, b"b"), (1, b"c")]


def test_an_error_of_one_ends_all() -> None:
    async def run() -> None:
        waiting, failing = Source("a", None), Source("b", Refusal(503, "no", "no"))
        with pytest.raises(Refusal):
            async for _ in merge([waiting.chunks(), failing.chunks()]):
                pass
        assert waiting.closed
        assert failing.closed

    asyncio.run(run())


def test_work_ends_with_the_client() -> None:
    async def run() -> None:
        source = Source("a", None)

        async def work() -> None:
            async for _ in source.chunks():
                pass

        with pytest.raises(ClientGone):
            await until_gone(request_of(goes), work())
        assert await until_gone(request_of(stays), asyncio.sleep(0, "done")) == "done"

    asyncio.run(run())


def test_a_stream_ends_with_the_client() -> None:
    async def run() -> None:
        source = Source("a", "b", None)
        chunks = source.chunks()
        response = await event_stream(request_of(stays), chunks)
        assert (await sent_by(response, goes)) in (b"", b"a", b"ab")
        assert source.closed

    asyncio.run(run())


def test_an_error_before_the_first_event_is_raised_and_later_ones_are_told() -> None:
    async def run() -> bytes:
        with pytest.raises(Refusal):
            await event_stream(request_of(stays), Source(Refusal(429, "full", "queue_full")).chunks())
        late = Source("a", Refusal(503, "gone", "model_restarted")).chunks()
        return await sent_by(await event_stream(request_of(stays), late), stays)

    body = asyncio.run(run())
    assert body.startswith(b"a")
    assert b'"code": "model_restarted"' in body


def test_a_silent_stream_is_kept_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "HEARTBEAT_S", 0.001)

    async def run() -> bytes:
        source = Source("a", None, "b")
        response = await event_stream(request_of(stays), source.chunks())
        asyncio.get_running_loop().call_later(0.05, source.gate.set)
        return await sent_by(response, stays)

    body = asyncio.run(run())
    assert body.startswith(b"a: waiting\n\n")
    assert body.endswith(b"b")
