"""What a server refuses before it listens: addresses, files; and the end of one whose model cannot be loaded."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import pytest
from toy_engine import MakeToy, ToyEngine

from moss_jt.errors import CheckpointError, ConfigError, MossError
from moss_jt.progress import Progress
from moss_jt.server.database import Database, open_database
from moss_jt.server.keys import add_key, find_key, list_keys
from moss_jt.server.link import ModelInfo
from moss_jt.server.refusals import Refusal
from moss_jt.server.running import serve
from moss_jt.server.settings import ServerSettings
from moss_jt.server.store import StoredTurn, add_turn, read_turns


@dataclass(frozen=True)
class NoModel:
    """A model that cannot be loaded."""

    def __call__(self, progress: Progress) -> tuple[ToyEngine, ModelInfo]:
        raise CheckpointError("the weights are not whole.")


def settings(folder: Path, **more: object) -> ServerSettings:
    """Of a server in a folder."""
    return ServerSettings(folder / "moss.db", **{"port": 0, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.255.255.1"])
def test_a_public_address_without_keys_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match=r"can be reached by others, and there are no keys.*moss-jt keys add"):
        serve(settings(tmp_path, host=host), MakeToy())


def test_an_address_of_another_machine_cannot_be_listened_at(tmp_path: Path) -> None:
    database = Database(tmp_path / "moss.db")
    database.now(add_key, "somebody")
    database.close()
    with pytest.raises(ConfigError, match=r"10\.255\.255\.1 port 0 cannot be listened at"):
        serve(settings(tmp_path, host="10.255.255.1"), MakeToy())


def test_an_unknown_host(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"host .no\.such\.host\.invalid. is not known"):
        serve(settings(tmp_path, host="no.such.host.invalid"), MakeToy())


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} cannot be listened at.*--port"):
            serve(settings(tmp_path, port=port), MakeToy())


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    with pytest.raises(MossError, match="the weights are not whole"):
        serve(settings(tmp_path), NoModel())


def test_two_servers_cannot_have_one_file(tmp_path: Path) -> None:
    first = Database(tmp_path / "moss.db")
    with pytest.raises(ConfigError, match="in use by another server"):
        Database(tmp_path / "moss.db")
    open_database(tmp_path / "moss.db").close()  # but the command line can look into it
    first.close()
    Database(tmp_path / "moss.db").close()


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "moss.db").write_bytes(b"something else " * 1000)
    with pytest.raises(ConfigError, match="not a database of moss-jt"):
        open_database(tmp_path / "moss.db")
    with pytest.raises(ConfigError, match="cannot be opened"):
        open_database(tmp_path)


def test_a_newer_file_is_refused_by_name(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "moss.db")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ConfigError, match="version 99; this program reads up to 2"):
        open_database(tmp_path / "moss.db")


def test_what_fails_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    database = Database(tmp_path / "moss.db")

    def half(connection: sqlite3.Connection) -> None:
        add_turn(connection, "a", "uid", StoredTurn("x", "y", "stop", ()), number=0, most=5)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(database.run(half))
    with pytest.raises(Refusal, match="no conversation"):
        database.now(read_turns, "a", "uid")
    turn = StoredTurn("x", "y", "length", ((1, 2), (3,)), 4, "t", "c", "r")
    database.now(add_turn, "a", "uid", turn, number=0, most=5)
    assert database.now(read_turns, "a", "uid") == [turn]
    database.close()


def test_keys(tmp_path: Path) -> None:
    connection = open_database(tmp_path / "moss.db")
    key = add_key(connection, "alice", requests_per_minute=5)
    assert len(key) > 40
    found = find_key(connection, key)
    assert found is not None
    assert (found.name, found.requests_per_minute, found.hint) == ("alice", 5, key[-4:])
    for wrong in ("", key[:-1], key + "x", key.upper(), "\ud800"):
        assert find_key(connection, wrong) is None
    with pytest.raises(ConfigError, match="a key named alice already"):
        add_key(connection, "alice")
    for name in ("", "a b", "é", "x" * 65, "-x"):
        with pytest.raises(ConfigError, match="cannot be the name of a key"):
            add_key(connection, name)
    with pytest.raises(ConfigError, match="limit of parallel is 0"):
        add_key(connection, "bob", parallel=0)
    assert [one.name for one in list_keys(connection)] == ["alice"]
    connection.close()


@pytest.mark.parametrize("wrong", [{"parallel": 0}, {"port": 70000}, {"queue": -1}, {"body_s": 0.0}])
def test_settings_that_cannot_be(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        settings(tmp_path, **wrong)
