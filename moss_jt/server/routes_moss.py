"""MOSS's own API, POST /, and the conversations that it keeps."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from moss_jt.config import GenerationConfig
from moss_jt.server.answers import Delta, Results, Thoughts
from moss_jt.server.calls import PICTURE_TYPES, DrawnPicture, FoundSource, ToolResults
from moss_jt.server.chats import Answered, Begun, Wish, conversation_name, converse
from moss_jt.server.refusals import Refusal
from moss_jt.server.routes_openai import sampling_config
from moss_jt.server.routing import ERRORS, STREAMS, notes_of, service_of, user_of
from moss_jt.server.schemas import MossRequest
from moss_jt.server.store import (
    LISTED,
    delete_conversation,
    drop_last_turn,
    list_conversations,
    read_picture,
    read_turns,
)
from moss_jt.server.streams import DONE, event_stream, sse, until_gone
from moss_jt.server.users import User

MAX_LENGTH = 2048  # MOSS's own

router = APIRouter(responses=ERRORS)
Uid = Annotated[str, Path(min_length=1, max_length=64)]
PictureName = Annotated[str, Path(min_length=1, max_length=64)]
_PICTURE_HEADERS = {  # a picture and nothing else, whatever a browser finds in it
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cache-Control": "private, no-store",
}


@router.post("/", summary="Say something in a conversation", tags=["moss"], response_model=None, responses=STREAMS)
async def say(request: Request, body: MossRequest) -> Response:
    """MOSS's own API. Without uid a conversation begins; its uid comes back, and opens it again.

    With stream, events of the types start, thoughts, results, delta and end come; end holds what is answered
    in one piece otherwise.
    """
    user, service = await user_of(request, asks=True), service_of(request)
    length = body.max_new_tokens or GenerationConfig.max_new_tokens
    config = sampling_config(service, body, length)
    wish = Wish(body.prompt, body.uid, body.max_length or MAX_LENGTH, config, body.stream, body.replace_turn)
    if body.stream:
        return await event_stream(request, _events(request, user, wish))
    return JSONResponse(await until_gone(request, _whole(request, user, wish)))


async def _whole(request: Request, user: User, wish: Wish) -> dict[str, Any]:
    found: dict[str, Any] = {}
    async with aclosing(converse(service_of(request), user, wish)) as parts:
        async for part in parts:
            if isinstance(part, Answered):
                found = _reply(part)
                _note(request, part)
    return found


async def _events(request: Request, user: User, wish: Wish) -> AsyncGenerator[bytes, None]:
    async with aclosing(converse(service_of(request), user, wish)) as parts:
        async for part in parts:
            if isinstance(part, Begun):
                yield sse({"type": "start", "uid": part.uid})
            elif isinstance(part, Delta) and part.text:
                yield sse({"type": "delta", "text": part.text})
            elif isinstance(part, Thoughts):
                yield sse({"type": "thoughts", "text": part.text, "commands": part.commands})
            elif isinstance(part, Results):
                found = part.found or ToolResults("")
                text = None if part.found is None else found.text
                yield sse({"type": "results", "text": text, **_found(found.sources, found.pictures)})
            elif isinstance(part, Answered):
                _note(request, part)
                usage = {**asdict(part.usage), "tokens_per_s": part.usage.tokens_per_s}
                yield sse({"type": "end", "reason": part.turn.reason, "usage": usage, **_reply(part)})
    yield DONE


def _reply(answered: Answered) -> dict[str, Any]:
    """The answer as MOSS's demo gives it."""
    return {
        "response": answered.turn.answer,
        "history": [list(pair) for pair in answered.history],
        "status": 200,
        "time": answered.asked_at,
        "uid": answered.uid,
    }


def _found(sources: Sequence[FoundSource], pictures: Sequence[DrawnPicture]) -> dict[str, Any]:
    """What tools found and drew, as events and exports tell it."""
    return {
        "sources": [asdict(source) for source in sources],
        "pictures": [{"name": one.name, "type": one.type, "note": one.note} for one in pictures],
    }


def _note(request: Request, answered: Answered) -> None:
    usage = answered.usage
    notes_of(request).update(prompt_tokens=usage.prompt_tokens, new_tokens=usage.new_tokens)
    if service_of(request).settings.log_texts:
        notes_of(request)["answers"] = [answered.turn.answer]


@router.get("/v1/conversations", summary="One's conversations", tags=["conversations"])
async def list_mine(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=LISTED)] = LISTED,
    before: Annotated[float | None, Query(ge=0, le=1e12, description="Last used before; seconds since 1970.")] = None,
) -> dict[str, Any]:
    """The conversations of a key, the last used first. Without keys nothing is listed: there the uid is the secret."""
    user, service = await user_of(request), service_of(request)
    if user.key is None:
        raise Refusal(
            403, "this server has no keys, so conversations are not listed: their uid is the secret.", "no_keys"
        )
    moment = time.time() + 1 if before is None else before
    found = await service.database.run(list_conversations, user.owner, before=moment, limit=limit)
    return {"object": "list", "data": [asdict(one) for one in found]}


@router.get("/v1/conversations/{uid}", summary="Export a conversation", tags=["conversations"])
async def export(request: Request, uid: Uid) -> dict[str, Any]:
    """Every turn, with thoughts, calls and results; what their sources are, and the names of pictures."""
    user, service = await user_of(request), service_of(request)
    turns = await service.database.run(read_turns, user.owner, uid)
    return {
        "object": "conversation",
        "uid": uid,
        "turns": [
            {
                "human": turn.human,
                "thoughts": turn.thoughts,
                "commands": turn.commands,
                "results": turn.results,
                **_found(turn.sources, turn.pictures),
                "answer": turn.answer,
                "reason": turn.reason,
                "created": turn.created,
            }
            for turn in turns
        ],
    }


@router.get(
    "/v1/conversations/{uid}/pictures/{name}",
    summary="A picture of a conversation",
    tags=["conversations"],
    response_class=Response,
    responses={200: {"content": {kind: {} for kind in PICTURE_TYPES}, "description": "The picture."}},
)
async def picture(request: Request, uid: Uid, name: PictureName) -> Response:
    """What a tool drew in a turn that is over."""
    user, service = await user_of(request), service_of(request)
    found = await service.database.run(read_picture, user.owner, uid, name)
    return Response(found.content, media_type=found.type, headers=_PICTURE_HEADERS)


@router.delete("/v1/conversations/{uid}", summary="Delete a conversation", tags=["conversations"])
async def delete(request: Request, uid: Uid) -> dict[str, Any]:
    """All of it, for good."""
    user, service = await user_of(request), service_of(request)
    await service.database.run(delete_conversation, user.owner, uid)
    service.dispatcher.forget(conversation_name(user.owner, uid))
    return {"uid": uid, "deleted": True}


@router.delete("/v1/conversations/{uid}/turns/last", summary="Take the last turn back", tags=["conversations"])
async def undo(
    request: Request,
    uid: Uid,
    number: Annotated[int | None, Query(ge=0, le=1 << 31, description="Only if the last turn is this, from 0.")] = None,
) -> dict[str, Any]:
    """Forget the last question and its answer. To say it again, or in other words, ask POST / to replace it."""
    user, service = await user_of(request), service_of(request)
    async with service.turnstiles.hold(f"{user.owner}\0{uid}"):
        human = await service.database.run(drop_last_turn, user.owner, uid, number=number)
    return {"uid": uid, "human": human}
