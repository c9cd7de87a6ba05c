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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moss_jt.chat.events import Reason
from moss_jt.server.calls import DrawnPicture, FoundSource
from moss_jt.server.keys import Key, is_valid
from moss_jt.server.refusals import Refusal

LISTED = 100  # conversations of one page of a list
TITLE = 80  # characters


@dataclass(frozen=True)
class StoredTurn:
    """A turn that is over.

    Attributes:
        passes: the generated ids, pass by pass; one without tools, else thoughts and commands, then the answer.
        first: index of the oldest turn that was in its prompt.
        sources: that its tools found.
        pictures: that they drew; those read from the store are without their content.
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
    sources: tuple[FoundSource, ...] = ()
    pictures: tuple[DrawnPicture, ...] = ()


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
    conversation = _find(connection, owner, uid)
    rows = connection.execute(
        "SELECT number, sources, human, answer, reason, passes, first, thoughts, commands, results, created FROM turns"
        " WHERE conversation = ? ORDER BY number",
        (conversation,),
    )
    pictures = _pictures(connection, conversation)
    return [_turn(row, sources, pictures.get(number, ())) for number, sources, *row in rows]


def add_turn(
    connection: sqlite3.Connection,
    owner: str,
    uid: str,
    turn: StoredTurn,
    *,
    number: int,
    most: int,
    replaces: bool = False,
    key: Key | None = None,
) -> None:
    """Write a turn; with turn 0 the conversation begins, unless it replaces the one that is there.

    Args:
        connection: of the database.
        owner: of the conversation.
        uid: and its name.
        turn: that is over.
        number: of the turn.
        most: conversations that an owner may have. Without a key, the one that was unused longest makes room.
        replaces: the turn takes the place of that of this number.
        key: with which it was asked; None where there are none.

    Raises:
        Refusal: 404, the conversation was deleted in between; 403, the owner has `most` already; 401, the key with
            which it was asked was removed, and what is kept now would be that of the next key of this name.
    """
    if key is not None and not is_valid(connection, key):
        raise Refusal(
            401, f"the key {key.name} was removed while it was answered. Ask with another.", "invalid_api_key"
        )
    if number == 0 and not replaces:
        _begin(connection, owner, uid, most, key)
    conversation = _find(connection, owner, uid)
    if replaces:
        connection.execute("DELETE FROM turns WHERE conversation = ? AND number = ?", (conversation, number))
    connection.execute(
        "INSERT INTO turns (conversation, number, human, answer, reason, passes, first, thoughts, commands, results,"
        " created, sources) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
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
            json.dumps([asdict(source) for source in turn.sources]) if turn.sources else None,
        ),
    )
    connection.executemany(
        "INSERT INTO pictures (conversation, number, name, type, note, content) VALUES (?, ?, ?, ?, ?, ?)",
        [(conversation, number, one.name, one.type, one.note, one.content) for one in turn.pictures],
    )
    connection.execute("UPDATE conversations SET updated = ? WHERE id = ?", (turn.created, conversation))


def read_picture(connection: sqlite3.Connection, owner: str, uid: str, name: str) -> DrawnPicture:
    """A picture of a conversation.

    Raises:
        Refusal: 404, there is no such conversation, or no such picture in it.
    """
    row = connection.execute(
        "SELECT name, type, note, content FROM pictures WHERE conversation = ? AND name = ?",
        (_find(connection, owner, uid), name),
    ).fetchone()
    if row is None:
        raise Refusal(
            404, "the conversation has no picture of this name. Its export names those that it has.", "no_picture"
        )
    return DrawnPicture(*row)


def drop_last_turn(connection: sqlite3.Connection, owner: str, uid: str, *, number: int | None = None) -> str:
    """Take the last turn back and give what the user had written.

    Args:
        number: the turn that is meant, from 0; None means the last one, whichever that is.

    Raises:
        Refusal: 404, there is no such conversation, or no turn in it; 409, the last one is not that which is meant.
    """
    conversation = _find(connection, owner, uid)
    rows = connection.execute(
        "SELECT human FROM turns WHERE conversation = ? ORDER BY number", (conversation,)
    ).fetchall()
    last = len(rows) - 1
    check_last(rows, last if number is None else number)
    connection.execute("DELETE FROM turns WHERE conversation = ? AND number = ?", (conversation, last))
    return str(rows[last][0])


def check_last(turns: Sequence[object], number: int) -> None:
    """Check that a turn is the last of a conversation.

    Raises:
        Refusal: 404, it has none; 409, another is.
    """
    last = len(turns) - 1
    if last < 0:
        raise Refusal(404, "the conversation has no turn to take back or replace.", "no_turn")
    if number != last:
        raise Refusal(
            409, f"the last turn is number {last}, not {number}. Read the conversation again.", "not_the_last"
        )


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


def _turn(row: list[Any], sources: str | None, pictures: tuple[DrawnPicture, ...]) -> StoredTurn:
    human, answer, reason, passes, first, thoughts, commands, results, created = row
    ids = tuple(tuple(int(i) for i in one) for one in json.loads(passes))
    found = tuple(FoundSource(**one) for one in json.loads(sources or "[]"))
    return StoredTurn(
        human, answer, reason, ids, first, thoughts, commands, results, created, sources=found, pictures=pictures
    )


def _pictures(connection: sqlite3.Connection, conversation: int) -> dict[int, tuple[DrawnPicture, ...]]:
    """What is known of a conversation's pictures, by turn."""
    found: dict[int, tuple[DrawnPicture, ...]] = {}
    for number, *row in connection.execute(
        "SELECT number, name, type, note FROM pictures WHERE conversation = ? ORDER BY rowid", (conversation,)
    ):
        found[number] = (*found.get(number, ()), DrawnPicture(*row))
    return found


def check_number(connection: sqlite3.Connection, owner: str, most: int) -> None:
    """Check that an owner may begin another conversation.

    Raises:
        Refusal: 403, there are `most` already.
    """
    count = _count(connection, owner)
    if count >= most:
        raise Refusal(
            403,
            f"{count} conversations are kept for this key, and {most} may be. Delete some.",
            "too_many_conversations",
        )


def _begin(connection: sqlite3.Connection, owner: str, uid: str, most: int, key: Key | None) -> None:
    if _row(connection, owner, uid) is not None:
        return  # all its turns were taken back, and this is the first again
    if key is not None:
        check_number(connection, owner, most)
    else:  # who could delete some is not known, and nobody may stop all others from beginning any
        connection.execute(
            "DELETE FROM conversations WHERE id IN"
            " (SELECT id FROM conversations WHERE owner = ? ORDER BY updated, id LIMIT ?)",
            (owner, max(0, _count(connection, owner) - most + 1)),
        )
    now = time.time()
    connection.execute(
        "INSERT INTO conversations (tag, uid, owner, created, updated) VALUES (?, ?, ?, ?, ?)",
        (_tag(owner, uid), uid, owner, now, now),
    )


def _count(connection: sqlite3.Connection, owner: str) -> int:
    return int(connection.execute("SELECT count(*) FROM conversations WHERE owner = ?", (owner,)).fetchone()[0])


def _row(connection: sqlite3.Connection, owner: str, uid: str) -> tuple[int] | None:
    found: tuple[int] | None = connection.execute(
        "SELECT id FROM conversations WHERE tag = ?", (_tag(owner, uid),)
    ).fetchone()
    return found


def _find(connection: sqlite3.Connection, owner: str, uid: str) -> int:
    row = _row(connection, owner, uid)
    if row is None:
        raise Refusal(
            404, "there is no conversation with this uid. Leave uid out to begin one.", "unknown_uid", param="uid"
        )
    return int(row[0])


def _tag(owner: str, uid: str) -> bytes:
    return hashlib.sha256(f"{owner}\0{uid}".encode("utf-8", "surrogatepass")).digest()
