"""What every route needs: the service, who asks, notes for the log, the errors that OpenAPI names."""

from __future__ import annotations

from typing import Any

from fastapi import Request

from moss_jt.server.schemas import ErrorReply
from moss_jt.server.service import Service
from moss_jt.server.users import User

NOTES = "moss_jt.notes"  # key of a request's scope

_MEANINGS = {
    400: "The request cannot be done as it is.",
    401: "A key is needed.",
    403: "Not allowed.",
    404: "There is no such thing, or it is another's.",
    405: "The route knows other methods.",
    409: "It is not as the request takes it to be.",
    408: "The request did not arrive in time.",
    413: "The request is too large.",
    415: "The body is not application/json.",
    429: "Too much at once; Retry-After says when to come again.",
    503: "Not now; Retry-After says when to come again.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": words} for status, words in _MEANINGS.items()
}


STREAMS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "The answer."}
}


def service_of(request: Request) -> Service:
    """The service behind the routes."""
    service = request.app.state.service
    assert isinstance(service, Service), "create_app puts it there"
    return service


def notes_of(request: Request) -> dict[str, Any]:
    """What the line of the log will say of a request."""
    notes: dict[str, Any] = request.scope.setdefault(NOTES, {})
    return notes


async def user_of(request: Request, *, asks: bool = False) -> User:
    """Who asks; with `asks` it counts against the limits of the key.

    Raises:
        Refusal: 401, no key; 429, a limit of the key.
    """
    users = service_of(request).users
    address = request.client.host if request.client is not None else ""
    user = await users.identify(request.headers.get("authorization"), address)
    notes_of(request)["user"] = user.owner
    if asks:
        await users.admit(user)
    return user
