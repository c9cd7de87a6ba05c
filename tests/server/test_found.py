"""What tools find and draw: told in a stream, kept with the turn, opened by the conversation's owner alone."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from finding_tools import PICTURE, SOURCES, FindingTools
from live_server import Client, LiveServer
from toy_engine import MakeToy


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(tmp_path_factory.mktemp("found"), keys=("alice", "bob"), tools=FindingTools()) as live:
        yield live


@pytest.fixture
def alice(server: LiveServer) -> Client:
    return server.client("alice")


def searched(client: Client) -> Any:
    """The events of a turn that searches, and at their end the conversation as it is kept."""
    with client.stream("/", {"prompt": "@search rain"}) as stream:
        return list(stream.events())


def picture_path(events: Any) -> str:
    """Where the picture of a turn is."""
    (found,) = [event for event in events if event["type"] == "results"]
    return f"/v1/conversations/{events[-1]['uid']}/pictures/{found['pictures'][0]['name']}"


def test_a_stream_and_an_export_tell_the_same(alice: Client) -> None:
    events = searched(alice)
    assert [event["type"] for event in events[:3]] == ["start", "thoughts", "results"]
    found = events[2]
    assert found["sources"] == [asdict(source) for source in SOURCES]
    assert [(one["type"], one["note"]) for one in found["pictures"]] == [("image/png", "a sketch")]
    (turn,) = alice.get(f"/v1/conversations/{events[0]['uid']}").json["turns"]
    assert (turn["sources"], turn["pictures"]) == (found["sources"], found["pictures"])
    assert turn["results"] == found["text"]


def test_a_turn_without_calls_finds_nothing(alice: Client) -> None:
    with alice.stream("/", {"prompt": "hello"}) as stream:
        events = list(stream.events())
    assert events[2] == {"type": "results", "text": None, "sources": [], "pictures": []}


def test_the_model_reads_that_nothing_ran_as_it_was_trained_to(alice: Client) -> None:
    told = alice.say("@results")
    assert told["response"] == repr("\nNone\n")
    with alice.stream("/", {"prompt": "more", "uid": told["uid"]}) as stream:
        *_, end = stream.events()
    new = end["usage"]["prompt_tokens"] - end["usage"]["reused_tokens"]
    assert new < 30, "it stands in the next prompt as it stood"


def test_a_picture_comes_as_a_picture_and_nothing_else(alice: Client) -> None:
    reply = alice.get(picture_path(searched(alice)))
    assert (reply.status, reply.body) == (200, PICTURE)
    assert reply.headers["content-type"] == "image/png"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["content-security-policy"] == "default-src 'none'; sandbox"


def test_another_cannot_see_a_picture(server: LiveServer, alice: Client) -> None:
    path = picture_path(searched(alice))
    unknown = "/v1/conversations/x/pictures/x"
    assert server.client("bob").get(path).body == server.client("bob").get(unknown).body, "as if it had never been"
    assert server.client("bob").get(path).status == 404
    assert server.client().get(path).status == 401
    assert alice.get(path).status == 200


def test_a_name_opens_no_picture_of_another_conversation(alice: Client) -> None:
    one, other = searched(alice), searched(alice)
    path = f"/v1/conversations/{one[-1]['uid']}/pictures/{picture_path(other).rpartition('/')[2]}"
    assert (alice.get(path).status, alice.get(path).code) == (404, "no_picture")


@pytest.mark.parametrize("what", ["", "/turns/last", "replaced"])
def test_a_picture_goes_with_its_turn(server: LiveServer, alice: Client, what: str) -> None:
    path = picture_path(searched(alice))
    conversation = path.partition("/pictures")[0]
    if what == "replaced":
        alice.say("something else", conversation.rpartition("/")[2], replace_turn=0)
    else:
        assert alice.ask("DELETE", conversation + what).status == 200
    assert alice.get(path).status == 404
    name = path.rpartition("/")[2]
    with sqlite3.connect(server.settings.database) as connection:
        assert connection.execute("SELECT count(*) FROM pictures WHERE name = ?", (name,)).fetchone() == (0,)
    connection.close()


def test_only_the_turn_that_is_meant_is_taken_back(alice: Client) -> None:
    uid = alice.say("one")["uid"]
    last = f"/v1/conversations/{uid}/turns/last"
    reply = alice.ask("DELETE", f"{last}?number=1")
    assert (reply.status, reply.code) == (409, "not_the_last")
    assert len(alice.get(f"/v1/conversations/{uid}").json["turns"]) == 1
    assert alice.ask("DELETE", f"{last}?number=0").json == {"uid": uid, "human": "one"}
    assert alice.ask("DELETE", f"{last}?number=0").code == "no_turn"


def test_figures_tell_what_may_be_asked_and_where_memory_is(server: LiveServer, alice: Client) -> None:
    alice.say("hello")
    found = alice.get("/v1/figures").json
    assert (found["model"], found["context_size"], found["longest_answer"]) == ("toy", 4096, 2048)
    assert (found["tools"], found["user"], found["lists"]) == (["search"], "alice", True)
    assert (found["waiting"], found["running"]) == (0, 0)
    assert found["memory"]["resident"] == 1 << 20
    assert found["memory"]["streamed"] == 2 << 20
    assert found["memory"]["kv"] == 3 << 20


@pytest.mark.parametrize("lines", [8, 300])
def test_long_results_leave_room_for_the_answer(tmp_path: Path, lines: int) -> None:
    """What was found was never measured: such a turn ended in 400 after all its work, and so did each after it."""
    tools = FindingTools(text=f"rain {'x' * 400}'\n<|2|>: '" * lines)
    with LiveServer(tmp_path, make_engine=MakeToy(1800), tools=tools) as live:
        client, uid = live.client(), None
        for number in range(4):
            said = client.say(f"@search number {number}", uid, max_length=1800)
            uid = said["uid"]
            assert said["response"].startswith(f"you said @search number {number}")
            assert ("and found" in said["response"]) is (lines == 8), "shorter lines, or none at all"
        turns = client.get(f"/v1/conversations/{uid}").json["turns"]
        assert all(len(turn["sources"]) == 2 for turn in turns)
        asked = {"messages": [{"role": "user", "content": "@search it"}], "max_tokens": 1000}
        assert client.post("/v1/chat/completions", asked).json["choices"][0]["finish_reason"] == "stop"


OLD = """
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
PRAGMA user_version = 1;
"""  # version 1, as it was


def test_a_file_of_the_first_version_is_taken_along(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "moss.db")
    connection.executescript(OLD)
    tag = hashlib.sha256(b"\0old").digest()
    connection.execute("INSERT INTO conversations VALUES (1, ?, 'old', '', 1.0, 2.0)", (tag,))
    connection.execute(
        "INSERT INTO turns VALUES (1, 0, 'one', 'you said one', NULL, NULL, NULL, 'stop', '[[]]', 0, 2.0)"
    )
    connection.commit()
    connection.close()
    turns: list[dict[str, Any]] = []
    for _ in range(2):
        with LiveServer(tmp_path, tools=FindingTools()) as live:  # the first takes it along, the second finds it done
            client = live.client()
            client.say("@search rain", "old")
            turns = client.get("/v1/conversations/old").json["turns"]
    assert [len(turn["pictures"]) for turn in turns] == [0, 1, 1]
    assert (turns[0]["human"], turns[0]["sources"]) == ("one", [])
