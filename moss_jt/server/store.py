"""Conversations on disk: texts and generated ids, found only by who owns them and knows their uid.

A row is looked up by a hash of owner and uid together: another's uid is as unknown as one that never was,
and no comparison tells how near a guess came. What surrounds the texts is made again by the template.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from moss_jt.chat.events import Reason
from moss_jt.server.refusals import Refusal

LISTED = 100  # conversations of one page of a list
TITLE = 80  # characters


@dataclass(frozen=True)
class StoredTurn:
    """A turn that is over.

    Attributes:
        passes: the generated ids, pass by pass; one without tools, else thoughts and commands, then the answer.
        first: index of the oldest turn that was in its prompt.
    """

    human: str
    answer: str
    reason: Reason
    passes: tuple[tuple[int, ...], ...]
    first: int = 0
    thoughts: str | None = None
    commands: str | None = None
    results: str | None = None
    created: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Listed:
    """A line of a list of conversations."""

    uid: str
    title: str
    turns: int
    created: float
    updated: float


def new_uid() -> str:
    """A name that nobody can guess."""
    return str(uuid.uuid4())


def read_turns(connection: sqlite3.Connection, owner: str, uid: str) -> list[StoredTurn]:
    """Every turn of a conversation, the oldest first.

    Raises:
        Refusal: 404, this owner has no such conversation.
    """
    rows = connection.execute(
        "SELECT human, answer, reason, passes, first, thoughts, commands, results, created FROM turns"
        " WHERE conversation = ? ORDER BY number",
        (_find(connection, owner, uid),),
    )
    return [_turn(*row) for row in rows]


def add_turn(connection: sqlite3.Connection, owner: str, uid: str, turn: StoredTurn, *, number: int, most: int) -> None:
    """Write a turn; with turn 0 the conversation begins.

    Raises:
        Refusal: 404, the conversation was deleted in between; 403, the owner has `most` already.
    """
    if number == 0:
        _begin(connection, owner, uid, most)
    conversation = _find(connection, owner, uid)
    connection.execute(
        "INSERT INTO turns (conversation, number, human, answer, reason, passes, first, thoughts, commands, results,"
        " created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            conversation,
            number,
            turn.human,
            turn.answer,
            turn.reason,
            json.dumps(turn.passes),
            turn.first,
            turn.thoughts,
            turn.commands,
            turn.results,
            turn.created,
        ),
    )
    connection.execute("UPDATE conversations SET updated = ? WHERE id = ?", (turn.created, conversation))


def drop_last_turn(connection: sqlite3.Connection, owner: str, uid: str) -> str:
    """Take the last turn back and give what the user had written.

    Raises:
        Refusal: 404, there is no such conversation, or no turn in it.
    """
    conversation = _find(connection, owner, uid)
    row = connection.execute(
        "SELECT number, human FROM turns WHERE conversation = ? ORDER BY number DESC LIMIT 1", (conversation,)
    ).fetchone()
    if row is None:
        raise Refusal(404, "the conversation has no turn to take back.", "no_turn")
    connection.execute("DELETE FROM turns WHERE conversation = ? AND number = ?", (conversation, row[0]))
    return str(row[1])


def delete_conversation(connection: sqlite3.Connection, owner: str, uid: str) -> None:
    """Delete a conversation with all its turns.

    Raises:
        Refusal: 404, this owner has no such conversation.
    """
    connection.execute("DELETE FROM conversations WHERE id = ?", (_find(connection, owner, uid),))


def list_conversations(connection: sqlite3.Connection, owner: str, *, before: float, limit: int) -> list[Listed]:
    """What an owner has, the last used first: those last used before a moment (seconds since 1970)."""
    rows = connection.execute(
        "SELECT uid, (SELECT human FROM turns WHERE conversation = id ORDER BY number LIMIT 1),"
        " (SELECT count(*) FROM turns WHERE conversation = id), created, updated FROM conversations"
        " WHERE owner = ? AND updated < ? ORDER BY updated DESC LIMIT ?",
        (owner, before, limit),
    )
    return [Listed(uid, " ".join((human or "").split())[:TITLE], *rest) for uid, human, *rest in rows]


def _turn(human: str, answer: str, reason: Reason, passes: str, *others: Any) -> StoredTurn:
    ids = tuple(tuple(int(i) for i in one) for one in json.loads(passes))
    return StoredTurn(human, answer, reason, ids, *others)


def _begin(connection: sqlite3.Connection, owner: str, uid: str, most: int) -> None:
    (count,) = connection.execute("SELECT count(*) FROM conversations WHERE owner = ?", (owner,)).fetchone()
    if count >= most:
        raise Refusal(
            403, f"{count} conversations are kept, and no more may be. Delete some.", "too_many_conversations"
        )
    now = time.time()
    connection.execute(
        "INSERT INTO conversations (tag, uid, owner, created, updated) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT DO NOTHING",  # all its turns were taken back, and this is the first again
        (_tag(owner, uid), uid, owner, now, now),
    )


def _find(connection: sqlite3.Connection, owner: str, uid: str) -> int:
    row = connection.execute("SELECT id FROM conversations WHERE tag = ?", (_tag(owner, uid),)).fetchone()
    if row is None:
        raise Refusal(
            404, "there is no conversation with this uid. Leave uid out to begin one.", "unknown_uid", param="uid"
        )
    return int(row[0])


def _tag(owner: str, uid: str) -> bytes:
    return hashlib.sha256(f"{owner}\0{uid}".encode("utf-8", "surrogatepass")).digest()
