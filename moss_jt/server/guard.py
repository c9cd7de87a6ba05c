"""The first to see a request: sizes, times, hosts, bodies without a key or without JSON end here, and cost nothing.

It also writes the line of the log and counts, so that what is refused here is seen, too.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import time
import uuid
from typing import NoReturn
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moss_jt.server.logs import ACCESS
from moss_jt.server.refusals import Refusal, wrong
from moss_jt.server.routing import NOTES
from moss_jt.server.service import Service

_log = logging.getLogger(ACCESS)
_WITH_BODY = ("POST", "PUT", "PATCH")
_DESCRIPTION = "/openapi.json"  # the one route that is FastAPI's, and asks for no key


class Guard:
    """Stands before the routes.

    Args:
        app: the routes.
        service: for the settings and the counters.
        hosts: names beside those of this machine that a request may come under while there are no keys.
    """

    def __init__(self, app: ASGIApp, *, service: Service, hosts: frozenset[str] = frozenset()) -> None:
        self._app = app
        self._service = service
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        name = uuid.uuid4().hex
        scope[NOTES] = {}

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = name
            await send(message)

        try:
            await self._admit(scope, receive, send_named)
        finally:
            self._tell(scope, name, status, time.monotonic() - began)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = Headers(scope=scope)
            self._check_origin(headers)
            await self._check_key(scope, headers)
            body = await self._body(headers, receive) if scope["method"] in _WITH_BODY else b""
        except Refusal as refusal:
            closing = {**refusal.headers(), "Connection": "close"}  # what else it sends is not read
            await JSONResponse(refusal.body(), refusal.status, closing)(scope, receive, send)
            return
        if body and self._service.settings.log_texts:
            scope[NOTES]["request"] = body.decode()
        await self._app(scope, _replay(body, receive), send)

    def _check_origin(self, headers: Headers) -> None:
        """Without keys, refuse what a page of another site may send in the name of a user who looks at it.

        Raises:
            Refusal: 403.
        """
        if self._service.users.needs_keys:
            return
        origin = headers.get("origin")
        asked = [f"//{headers.get('host', '')}", *([origin] if origin is not None else [])]
        for where in asked:
            host = _host_of(where)
            if host is None or not (is_local(host) or host in self._hosts):
                raise Refusal(
                    403,
                    "without keys only programs and pages of this machine are answered. Make a key.",
                    "foreign_origin",
                )

    async def _check_key(self, scope: Scope, headers: Headers) -> None:
        """Read no body of somebody without a key; the routes ask for it again, each for itself.

        Raises:
            Refusal: 401.
        """
        users = self._service.users
        if (users.needs_keys and scope["method"] in _WITH_BODY) or scope["path"] == _DESCRIPTION:
            await users.identify(headers.get("authorization"), "")

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The body, whole, in time, and JSON.

        Raises:
            Refusal: it is none of these.
        """
        settings = self._service.settings
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > settings.body_bytes:
            raise _too_large(settings.body_bytes)
        try:
            body = await asyncio.wait_for(_read(receive, settings.body_bytes), settings.body_s)
        except asyncio.TimeoutError:
            raise Refusal(408, f"the request did not arrive within {settings.body_s:g} s.", "too_slow") from None
        if body and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "the body must be JSON: send Content-Type: application/json.", "not_json")
        check_json(body)
        return body

    def _tell(self, scope: Scope, name: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._service.metrics.requests.labels(route, str(status)).inc()
        self._service.metrics.seconds.labels(route).observe(seconds)
        fields = {"request": name, "method": scope["method"], "route": route, "status": status}
        notes = {f"sent_{k}" if k == "request" else k: v for k, v in scope[NOTES].items()}
        _log.info("request", extra={"fields": {**fields, "ms": round(seconds * 1000, 1), **notes}})


async def _read(receive: Receive, most: int) -> bytes:
    chunks, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise wrong("the request ended before its body.")
        chunk = message.get("body", b"")
        chunks.append(chunk)
        size += len(chunk)
        if size > most:
            raise _too_large(most)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body in one piece, then what else comes."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def check_json(body: bytes) -> None:
    """Refuse a body that is no JSON, as its standard has it.

    Raises:
        Refusal: 400.
    """
    if not body:
        return
    try:
        json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise wrong(
            f"the body is not UTF-8: byte {error.start} is {body[error.start]:#04x}.", code="not_utf8"
        ) from None
    except RecursionError:
        raise wrong("the body is nested too deeply.", code="too_deep") from None
    except ValueError as error:
        raise wrong(f"the body is not JSON: {' '.join(str(error).split())[:200]}.", code="not_json") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _too_large(most: int) -> Refusal:
    return Refusal(413, f"the body has more than {most} bytes.", "too_large")


def _host_of(where: str) -> str | None:
    """The name in an address, None where it has none."""
    try:
        return urlsplit(where).hostname
    except ValueError:
        return None


def is_local(host: str) -> bool:
    """Whether a name or an address is this machine's alone."""
    if host.lower() in ("localhost", "ip6-localhost") or host.lower().endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
