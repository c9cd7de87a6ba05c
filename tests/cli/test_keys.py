"""`moss-jt keys add|list|remove`."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from moss_jt.cli.keys import command
from moss_jt.errors import ConfigError
from moss_jt.server.database import open_database
from moss_jt.server.keys import find_key
from moss_jt.server.settings import default_database
from moss_jt.server.store import StoredTurn, add_turn, read_turns


def run(*args: str) -> Result:
    return CliRunner().invoke(command, args, catch_exceptions=False)


@pytest.fixture
def database(own_home: Path) -> sqlite3.Connection:
    """The file that the command uses unless told otherwise."""
    return open_database(default_database())


def test_a_key_is_made_listed_and_removed(database: sqlite3.Connection) -> None:
    key = run("add", "alice", "--requests-per-minute", "20", "--tokens-per-day", "1000").stdout.strip()
    found = find_key(database, key)
    assert found is not None
    assert (found.name, found.requests_per_minute, found.parallel, found.tokens_per_day) == ("alice", 20, None, 1000)
    listed = run("list").stdout
    assert listed.startswith(f"alice  …{key[-4:]}  20")
    assert "20 requests a minute, 1000 tokens a day" in listed
    assert key not in listed
    (entry,) = json.loads(run("list", "--json").stdout)
    assert (entry["name"], entry["parallel"]) == ("alice", None)
    add_turn(database, "alice", "uid", StoredTurn("a", "b", "stop", ()), number=0, most=9)
    assert "Removed alice and 1 conversations" in run("remove", "alice").stderr
    assert find_key(database, key) is None
    assert run("list").stdout == ""


def test_conversations_are_kept_where_asked(database: sqlite3.Connection) -> None:
    run("add", "alice")
    add_turn(database, "alice", "uid", StoredTurn("a", "b", "stop", ()), number=0, most=9)
    run("remove", "alice", "--keep-conversations")
    assert len(read_turns(database, "alice", "uid")) == 1


def test_errors_change_nothing(tmp_path: Path) -> None:
    file = ["--database", str(tmp_path / "keys.db")]
    run("add", "alice", *file)
    for words, args in (("already", ["add", "alice"]), ("no key named bob", ["remove", "bob"])):
        with pytest.raises(ConfigError, match=words):
            run(*args, *file)
    assert run("list", *file).stdout.count("\n") == 1
    assert run("add", "bob", "--parallel", "0", *file).exit_code == 2
