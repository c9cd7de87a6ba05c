"""The file of keys and conversations: SQLite with a write-ahead log, so that a kill loses nothing finished.

One thread has the connection; the event loop asks it by `Database.run`. The command line opens the
file by itself, which SQLite allows beside a running server.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from moss_jt.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")

VERSION = 2
_FIRST = """
CREATE TABLE keys (
    name TEXT PRIMARY KEY, hash BLOB NOT NULL UNIQUE, hint TEXT NOT NULL, created REAL NOT NULL,
    requests_per_minute INTEGER, parallel INTEGER, tokens_per_day INTEGER
);
CREATE TABLE usage (
    owner TEXT NOT NULL, day TEXT NOT NULL, requests INTEGER NOT NULL, tokens INTEGER NOT NULL, PRIMARY KEY (owner, day)
);
CREATE TABLE conversations (
    id INTEGER PRIMARY KEY, tag BLOB NOT NULL UNIQUE, uid TEXT NOT NULL, owner TEXT NOT NULL,
    created REAL NOT NULL, updated REAL NOT NULL
);
CREATE INDEX conversations_of_owner ON conversations (owner, updated);
CREATE TABLE turns (
    conversation INTEGER NOT NULL REFERENCES conversations (id) ON DELETE CASCADE, number INTEGER NOT NULL,
    human TEXT NOT NULL, answer TEXT NOT NULL, thoughts TEXT, commands TEXT, results TEXT,
    reason TEXT NOT NULL, passes TEXT NOT NULL, first INTEGER NOT NULL, created REAL NOT NULL,
    PRIMARY KEY (conversation, number)
) WITHOUT ROWID;
"""
_SECOND = """
ALTER TABLE turns ADD COLUMN sources TEXT;
CREATE TABLE pictures (
    conversation INTEGER NOT NULL, number INTEGER NOT NULL, name TEXT NOT NULL,
    type TEXT NOT NULL, note TEXT NOT NULL, content BLOB NOT NULL, PRIMARY KEY (conversation, name),
    FOREIGN KEY (conversation, number) REFERENCES turns (conversation, number) ON DELETE CASCADE
);
"""
_STEPS = (_FIRST, _SECOND)  # from version to version


def open_database(path: Path) -> sqlite3.Connection:
    """Open the file, or make it, readable by its owner only.

    Raises:
        ConfigError: it cannot be opened, is not such a file, or is of a newer version.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be opened: {reason}. Name another file with --database.") from error
    try:
        _prepare(connection, path)
    except sqlite3.DatabaseError as error:
        connection.close()
        raise ConfigError(
            f"{path} is not a database of moss-jt, or is broken: {error}. Move it away, or name another with --database."
        ) from error
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    for setting in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "secure_delete = ON"):
        connection.execute(f"PRAGMA {setting}")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise ConfigError(f"{path} has version {version}; this program reads up to {VERSION}. Update moss-jt.")
    if version < VERSION:
        _bring_up(connection)


def _bring_up(connection: sqlite3.Connection) -> None:
    """Make the tables of the newest version, or take those of an older one along; all of it or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()  # another program may have been first
        for statement in "".join(_STEPS[version:]).split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {VERSION}")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


class Database:
    """The server's connection, in a thread of its own.

    Args:
        path: of the file. One server at a time may have it.

    Raises:
        ConfigError: as `open_database`; or another server has it.
    """

    def __init__(self, path: Path) -> None:
        self._connection = open_database(path)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            self._connection.close()
            raise ConfigError(
                f"{path} is in use by another server. End that one, or name another file with --database."
            ) from error

    async def run(self, work: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Have the thread call a function with the connection; all it changes is kept, or nothing."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._whole, work, args, kwargs)

    def now(self, work: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same, waiting for it; not for the event loop."""
        return self._thread.submit(self._whole, work, args, kwargs).result()

    def _whole(self, work: Callable[..., T], args: tuple[object, ...], kwargs: dict[str, object]) -> T:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            result = work(self._connection, *args, **kwargs)
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")
        return result

    def close(self) -> None:
        """Finish what was asked, and close the file."""
        self._thread.shutdown()
        self._connection.close()
        os.close(self._lock)
