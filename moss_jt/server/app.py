"""The routes joined to one application, and errors in one form."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from moss_jt import __version__
from moss_jt.server import routes_health, routes_moss, routes_openai
from moss_jt.server.guard import Guard
from moss_jt.server.refusals import Refusal, error_body
from moss_jt.server.service import Service
from moss_jt.server.streams import ClientGone

GONE = 499  # nobody sees it; it stands in the log

_PARTS = (routes_moss, routes_openai, routes_health)
_log = logging.getLogger(__name__)


def create_app(service: Service, *, hosts: frozenset[str] = frozenset()) -> ASGIApp:
    """Make the application of a service, which it starts and stops.

    Args:
        service: what is behind the routes.
        hosts: see Guard.
    """
    app = FastAPI(
        title="moss-jt",
        version=__version__,
        description="MOSS by its own API and by OpenAI's.",
        docs_url=None,  # these pages fetch scripts from elsewhere
        redoc_url=None,
        lifespan=_lifespan(service),
    )
    app.state.service = service
    for part in _PARTS:
        app.include_router(part.router)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientGone, _gone)
    app.add_exception_handler(Exception, _unexpected)
    app.openapi = _openapi(app, service)  # type: ignore[method-assign]
    return Guard(app, service=service, hosts=hosts)


def _lifespan(service: Service) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    return lifespan


def _openapi(app: FastAPI, service: Service) -> Callable[[], dict[str, Any]]:
    """The description of the API: keys where they are needed, and 400 in place of FastAPI's 422."""

    described: dict[bool, dict[str, Any]] = {}

    def describe() -> dict[str, Any]:
        needs_keys = service.users.needs_keys
        if needs_keys not in described:
            described[needs_keys] = make(needs_keys)
        return described[needs_keys]

    def make(needs_keys: bool) -> dict[str, Any]:
        found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for path, operations in found["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if needs_keys and path not in ("/healthz", "/readyz"):
                    operation["security"] = [{"key": []}]
        for name in ("HTTPValidationError", "ValidationError"):
            found["components"]["schemas"].pop(name, None)
        if needs_keys:
            found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return found

    return describe


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal), "registered for it"
    return JSONResponse(error.body(), error.status, error.headers())


async def _invalid(_: Request, error: Exception) -> Response:
    """The first thing that is wrong, by its place; never what was sent."""
    first = cast(RequestValidationError, error).errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:])
    place = place.encode("utf-8", "replace").decode()[:200]  # names of fields are the client's
    message = f"{place or 'the body'}: {first['msg']}."
    return JSONResponse(error_body(400, " ".join(message.split())[:400], "invalid_value", place or None), 400)


async def _http_error(request: Request, error: Exception) -> Response:
    known = cast(HTTPException, error)
    code = {404: "no_route", 405: "no_method"}.get(known.status_code)
    headers = {**(known.headers or {}), **({"Allow": _methods(request)} if known.status_code == 405 else {})}
    return JSONResponse(error_body(known.status_code, f"{known.detail}.", code), known.status_code, headers)


def _methods(request: Request) -> str:
    """All methods that a path knows: those of one path may be spread over several routes."""
    path = request.scope["path"]
    routes = [route for part in _PARTS for route in part.router.routes if isinstance(route, APIRoute)]
    found = {method for route in routes if route.path_regex.fullmatch(path) for method in route.methods or ()}
    return ", ".join(sorted(found))


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=GONE)


async def _unexpected(_: Request, error: Exception) -> Response:
    _log.error("a request failed: %r", error, exc_info=error)
    return JSONResponse(error_body(500, "something went wrong; the log of the server says what.", "internal"), 500)
