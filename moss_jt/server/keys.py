"""API keys: made at random, kept as hashes, found by their hash, so that neither the file nor a clock tells one."""

from __future__ import annotations

import hashlib
import re
import secrets
import sqlite3
import time
from dataclasses import dataclass

from moss_jt.errors import ConfigError

PREFIX = "moss-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Key:
    """What is known of a key.

    Attributes:
        name: whose it is; conversations belong to it.
        hint: its last characters.
        created: seconds since 1970.
        requests_per_minute: None for no limit.
        parallel: answers at once; None for no limit but the server's.
        tokens_per_day: of prompts and answers, by the day of UTC; None for no limit.
    """

    name: str
    hint: str
    created: float
    requests_per_minute: int | None = None
    parallel: int | None = None
    tokens_per_day: int | None = None


_COLUMNS = "name, hint, created, requests_per_minute, parallel, tokens_per_day"


def add_key(
    connection: sqlite3.Connection,
    name: str,
    *,
    requests_per_minute: int | None = None,
    parallel: int | None = None,
    tokens_per_day: int | None = None,
) -> str:
    """Make a key and give it; only now can it be seen.

    Raises:
        ConfigError: the name cannot be, or has a key.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be the name of a key: letters, digits, dot, dash and underscore, 64 at most. Take another."
        )
    for words, limit in (
        ("requests a minute", requests_per_minute),
        ("parallel", parallel),
        ("tokens a day", tokens_per_day),
    ):
        if limit is not None and not 1 <= limit < 1 << 62:
            raise ConfigError(f"the limit of {words} is {limit}; it must be at least 1.")
    key = PREFIX + secrets.token_urlsafe(32)
    values = (name, _hash(key), key[-4:], time.time(), requests_per_minute, parallel, tokens_per_day)
    try:
        connection.execute(
            "INSERT INTO keys (name, hash, hint, created, requests_per_minute, parallel, tokens_per_day)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            values,
        )
    except sqlite3.IntegrityError:
        raise ConfigError(f"there is a key named {name} already. Remove it first, or take another name.") from None
    return key


def find_key(connection: sqlite3.Connection, key: str) -> Key | None:
    """The key that somebody shows, None if it is none of ours."""
    row = connection.execute(f"SELECT {_COLUMNS} FROM keys WHERE hash = ?", (_hash(key),)).fetchone()
    return None if row is None else Key(*row)


def is_valid(connection: sqlite3.Connection, key: Key) -> bool:
    """Whether this very key is still there; another of the same name is another's."""
    wanted = (key.name, key.created)
    return connection.execute("SELECT 1 FROM keys WHERE name = ? AND created = ?", wanted).fetchone() is not None


def list_keys(connection: sqlite3.Connection) -> list[Key]:
    """Every key, the oldest first."""
    return [Key(*row) for row in connection.execute(f"SELECT {_COLUMNS} FROM keys ORDER BY created, name")]


def has_keys(connection: sqlite3.Connection) -> bool:
    """Whether there is one."""
    return connection.execute("SELECT 1 FROM keys LIMIT 1").fetchone() is not None


def remove_key(connection: sqlite3.Connection, name: str, *, keep_conversations: bool) -> int:
    """Remove a key, and with it what nobody could read any more; gives how many conversations that were.

    Raises:
        ConfigError: there is none of this name.
    """
    if not connection.execute("DELETE FROM keys WHERE name = ?", (name,)).rowcount:
        raise ConfigError(f"there is no key named {name}. `moss-jt keys list` names them.")
    if keep_conversations:
        return 0
    connection.execute("DELETE FROM usage WHERE owner = ?", (name,))
    return connection.execute("DELETE FROM conversations WHERE owner = ?", (name,)).rowcount


def count_usage(connection: sqlite3.Connection, key: Key, tokens: int) -> None:
    """Add a request and its tokens to today's; nothing where the key was removed."""
    if not is_valid(connection, key):
        return
    connection.execute(
        "INSERT INTO usage VALUES (?, date('now'), 1, ?)"
        " ON CONFLICT DO UPDATE SET requests = requests + 1, tokens = tokens + excluded.tokens",
        (key.name, tokens),
    )


def tokens_today(connection: sqlite3.Connection, owner: str) -> int:
    """Tokens of prompts and answers so far today."""
    row = connection.execute("SELECT tokens FROM usage WHERE owner = ? AND day = date('now')", (owner,)).fetchone()
    return 0 if row is None else int(row[0])


def _hash(key: str) -> bytes:
    """A key has 256 random bits: one round of a fast hash is as good as many of a slow one."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
