"""What belongs to one is as if it were not there for all others, on every route."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from live_server import Asked, LiveServer, until

from moss_jt.server.keys import add_key, remove_key, tokens_today

ROUTES = [
    ("GET", "/v1/conversations/{uid}", None),
    ("DELETE", "/v1/conversations/{uid}", None),
    ("DELETE", "/v1/conversations/{uid}/turns/last", None),
    ("DELETE", "/v1/conversations/{uid}/turns/last?number=0", None),
    ("GET", "/v1/conversations/{uid}/pictures/00000000000000000000000000000000", None),
    ("POST", "/", {"prompt": "go on", "uid": "{uid}"}),
    ("POST", "/", {"prompt": "go on", "uid": "{uid}", "stream": True}),
]
PRIVATE = [
    *ROUTES,
    ("GET", "/v1/conversations", None),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/toy", None),
    ("GET", "/metrics", None),
    ("GET", "/v1/figures", None),
    ("GET", "/openapi.json", None),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ("POST", "/v1/completions", {"prompt": "x"}),
]


def filled(body: dict[str, object] | None, uid: str) -> dict[str, object] | None:
    """A body with the uid in its place."""
    return None if body is None else {k: uid if v == "{uid}" else v for k, v in body.items()}


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
def test_another_cannot(keyed_server: LiveServer, method: str, path: str, body: dict[str, object] | None) -> None:
    alice, bob = keyed_server.client("alice"), keyed_server.client("bob")
    uid = alice.say("a secret")["uid"]
    reply = bob.ask(method, path.format(uid=uid), filled(body, uid))
    unknown = bob.ask(method, path.format(uid="x" + uid[1:]), filled(body, "x" + uid[1:]))
    assert reply.status == 404
    assert (reply.status, reply.body) == (unknown.status, unknown.body), "as if it had never been"
    assert len(alice.get(f"/v1/conversations/{uid}").json["turns"]) == 1, "nothing has changed"
    assert uid not in [one["uid"] for one in bob.get("/v1/conversations").json["data"]]


def test_the_owner_can(keyed_server: LiveServer) -> None:
    alice = keyed_server.client("alice")
    uid = alice.say("first words")["uid"]
    assert alice.get("/v1/conversations").json["data"][0]["title"] == "first words"
    assert alice.get("/v1/conversations").json["data"][0]["uid"] == uid
    exported = alice.get(f"/v1/conversations/{uid}").json
    assert [(turn["human"], turn["answer"]) for turn in exported["turns"]] == [("first words", "you said first words")]
    assert alice.ask("DELETE", f"/v1/conversations/{uid}").json == {"uid": uid, "deleted": True}
    assert alice.get(f"/v1/conversations/{uid}").status == 404
    assert uid not in [one["uid"] for one in alice.get("/v1/conversations").json["data"]]


def test_lists_come_in_pages(keyed_server: LiveServer) -> None:
    bob = keyed_server.client("bob")
    uids = [bob.say(f"number {n}")["uid"] for n in range(5)]
    found: list[str] = []
    before = ""
    for _ in range(5):
        page = bob.get(f"/v1/conversations?limit=1{before}").json["data"]
        found += [one["uid"] for one in page]
        before = f"&before={page[0]['updated']!r}"
    assert found == uids[::-1]


@pytest.mark.parametrize(("method", "path", "body"), PRIVATE)
@pytest.mark.parametrize("key", [None, "moss-wrong", ""])
def test_without_a_key_nobody_gets_in(
    keyed_server: LiveServer, method: str, path: str, body: dict[str, object] | None, key: str | None
) -> None:
    reply = keyed_server.client(key).ask(method, path.format(uid="some"), filled(body, "some"))
    assert (reply.status, reply.code) == (401, "invalid_api_key")
    assert reply.headers["www-authenticate"] == "Bearer"


def test_those_who_watch_need_no_key(keyed_server: LiveServer) -> None:
    assert keyed_server.client().get("/healthz").status == keyed_server.client().get("/readyz").status == 200


def test_without_keys_the_uid_is_the_secret_and_nothing_is_listed(open_server: LiveServer) -> None:
    client = open_server.client()
    uid = client.say("hello")["uid"]
    assert client.get("/v1/conversations").code == "no_keys"
    assert client.get(f"/v1/conversations/{uid}").status == 200
    assert client.ask("DELETE", f"/v1/conversations/{uid}").status == 200


def test_a_key_counts_at_once_and_is_gone_at_once(tmp_path: Path) -> None:
    with LiveServer(tmp_path) as live:
        uid = live.client().say("before there were keys")["uid"]
        key = live.database.now(add_key, "carol")
        assert live.client().get(f"/v1/conversations/{uid}").status == 401
        carol = live.client(key)
        assert carol.get(f"/v1/conversations/{uid}").status == 404, "what was nobody's does not become hers"
        mine = carol.say("mine")["uid"]
        assert live.database.now(remove_key, "carol", keep_conversations=False) == 1
        assert carol.get(f"/v1/conversations/{mine}").status == 401
        assert live.client().get("/v1/models").status == 401, "the last key gone, the server does not open"
        again = live.client(live.database.now(add_key, "carol"))
        assert again.get(f"/v1/conversations/{mine}").status == 404, "a new carol does not inherit"


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_outlives_its_key_is_not_kept(tmp_path: Path, stream: bool) -> None:
    """Its turn brought the conversation back, for whoever got a key of the same name next."""
    with LiveServer(tmp_path) as live:
        key = live.database.now(add_key, "carol")
        asked = {"prompt": "@long", "max_new_tokens": 1000, "stream": stream}
        asking = Asked(lambda: live.client(key).post("/", asked))
        until(lambda: live.service.dispatcher.running == 1, "it is answered")
        live.database.now(remove_key, "carol", keep_conversations=False)
        again = live.client(live.database.now(add_key, "carol"))
        reply = asking.reply()
        assert b"the key carol was removed while it was answered" in reply.body
        assert reply.status == (200 if stream else 401)
        assert again.get("/v1/conversations").json["data"] == []
        assert live.database.now(tokens_today, "carol") == 0


def test_no_key_and_no_uid_stand_in_the_file_in_a_form_that_opens(keyed_server: LiveServer) -> None:
    keyed_server.client("alice").say("hello")
    with sqlite3.connect(keyed_server.settings.database) as connection:
        rows = connection.execute("SELECT * FROM keys").fetchall()
    connection.close()
    secret = keyed_server.keys["alice"]
    assert len(rows) == 2
    assert all(secret not in str(value) for row in rows for value in row)
    assert keyed_server.settings.database.stat().st_mode & 0o077 == 0


def test_what_one_computed_speeds_up_nobody_else(keyed_server: LiveServer) -> None:
    body = {"messages": [{"role": "user", "content": "a thing that only alice asks about"}]}
    reused = []
    for name in ("alice", "alice", "bob"):
        usage = keyed_server.client(name).post("/v1/chat/completions", body).json["usage"]
        reused.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert reused[1] > 0
    assert reused[2] == 0


def test_a_new_key_of_an_old_name_finds_nothing_computed(tmp_path: Path) -> None:
    """Caches were found by the name of the key, so the next carol saw by the clock what the first had asked."""
    body = {"messages": [{"role": "user", "content": "a thing that only the first carol asks about"}]}
    with LiveServer(tmp_path) as live:
        reused = []
        for _ in range(2):
            carol = live.client(live.database.now(add_key, "carol"))
            usage = [carol.post("/v1/chat/completions", body).json["usage"] for _ in range(2)]
            reused += [one["prompt_tokens_details"]["cached_tokens"] for one in usage]
            live.database.now(remove_key, "carol", keep_conversations=False)
    assert reused[1] == reused[3] > reused[0] == reused[2] == 0
