"""Queue, fairness, limits of keys and of time, and the end of a server."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from finding_tools import FindingTools
from live_server import LONGEST_S, Asked, LiveServer, until
from toy_engine import MakeToy

from moss_jt.messages import PrefillEvent, TokenEvent
from moss_jt.server.calls import ToolResults
from moss_jt.server.dispatch import Dispatcher
from moss_jt.server.keys import add_key, tokens_today
from moss_jt.server.link import Happened
from moss_jt.server.process import ModelProcess
from moss_jt.server.refusals import Refusal
from moss_jt.server.settings import ServerSettings

CHAT = "/v1/chat/completions"


def chat(text: str, **more: Any) -> dict[str, Any]:
    """The body of a question."""
    return {"messages": [{"role": "user", "content": text}], **more}


def test_a_full_queue_says_when_to_come_again(tmp_path: Path) -> None:
    with LiveServer(tmp_path, parallel=1, queue=1) as live:
        client, dispatcher = live.client(), live.service.dispatcher
        with client.stream(CHAT, chat("@long", max_tokens=3000)) as holder:
            next(holder.events())
            waits = Asked(lambda: client.post(CHAT, chat("patient")))
            until(lambda: dispatcher.waiting == 1, "one waits")
            for path, body in (
                (CHAT, chat("late")),
                ("/", {"prompt": "late"}),
                ("/v1/completions", {"prompt": "late"}),
            ):
                reply = client.post(path, body)
                assert (reply.status, reply.code) == (429, "queue_full")
                assert 1 <= int(reply.headers["retry-after"]) <= 60
                reply = client.post(path, {**body, "stream": True})
                assert reply.status == 429, "also for a stream, before it begins"
        assert waits.reply().json["choices"][0]["message"]["content"] == "you said patient"


def test_more_answers_than_there_can_be_places_are_refused_for_good(tmp_path: Path) -> None:
    """They were told to come again, each time."""
    with LiveServer(tmp_path, parallel=1, queue=2, queue_per_user=1, keys=("alice",)) as live:
        client = live.client("alice")
        text = "/v1/completions"
        for path, body in (
            (CHAT, chat("x", n=3)),
            (text, {"prompt": "x", "n": 3}),
            (text, {"prompt": ["x"] * 3}),
            (text, {"prompt": ["x", "y"], "n": 2, "stream": True}),
        ):
            reply = client.post(path, body)
            assert (reply.status, reply.json["error"]["param"]) == (400, "n")
            assert "of one user 2 can run and wait here" in reply.json["error"]["message"]
        for path, body in ((CHAT, chat("x", n=2)), (text, {"prompt": ["x", "y"]}), (text, {"prompt": [5, 6, 7]})):
            assert client.post(path, body).status == 200


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("most", [None, 1, 2, 3])
@pytest.mark.parametrize(("queue", "queue_per_user"), [(0, 1), (1, 4), (5, 2)])
def test_the_capacity_is_what_is_taken(
    monkeypatch: pytest.MonkeyPatch, queue: int, queue_per_user: int, most: int | None, known: bool
) -> None:
    settings = ServerSettings(Path("none"), parallel=2, queue=queue, queue_per_user=queue_per_user)
    monkeypatch.setattr(ModelProcess, "send", lambda *_: None)

    async def taken() -> int:
        dispatcher: Any = Dispatcher(settings, MakeToy())
        dispatcher.state, dispatcher.model = "ready", "a model"
        for count in range(20):
            try:
                dispatcher.submit("alice", None, most=most, known=known)
            except Refusal:
                return count
            assert count < dispatcher.capacity(most=most, known=known)
        raise AssertionError("it takes any number")

    assert asyncio.run(taken()) == Dispatcher(settings, MakeToy()).capacity(most=most, known=known)


class Waiting(FindingTools):
    """Tools that give nothing until they may."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.may = threading.Event(), threading.Event()

    def run(self, commands: str) -> ToolResults | None:
        self.called.set()
        assert self.may.wait(LONGEST_S)
        return super().run(commands)


def test_an_answer_that_has_begun_finds_the_queue_never_full(tmp_path: Path) -> None:
    """Behind its tools it was counted as a new request, and refused with all that it had done."""
    tools = Waiting()
    with LiveServer(tmp_path, parallel=1, queue=1, tools=tools) as live:
        client, dispatcher = live.client(), live.service.dispatcher
        begun = Asked(lambda: client.post(CHAT, chat("@search rain")))
        assert tools.called.wait(LONGEST_S)
        with client.stream(CHAT, chat("@long", max_tokens=3000, tool_choice="none")) as holder:
            next(holder.events())
            waits = Asked(lambda: client.post(CHAT, chat("patient", tool_choice="none")))
            until(lambda: dispatcher.waiting == 1, "one waits")
            tools.may.set()
            until(lambda: dispatcher.waiting == 2, "it waits, too")
        assert "and found" in begun.reply().json["choices"][0]["message"]["content"]
        assert waits.reply().status == 200


@pytest.mark.parametrize("ended", [False, True])
def test_an_answer_that_has_begun_may_finish_while_the_server_ends(tmp_path: Path, ended: bool) -> None:
    tools = Waiting()
    with LiveServer(tmp_path, grace_s=20, tools=tools) as live:
        client, dispatcher = live.client(), live.service.dispatcher
        begun = Asked(lambda: client.post("/", {"prompt": "@search rain"}))
        assert tools.called.wait(LONGEST_S)
        (dispatcher.end_all if ended else dispatcher.drain)()
        assert client.post("/", {"prompt": "new"}).code == "ending"
        tools.may.set()
        assert begun.reply().status == (503 if ended else 200)


def test_one_key_cannot_fill_the_queue(tmp_path: Path) -> None:
    with LiveServer(tmp_path, parallel=1, queue=9, queue_per_user=1, keys=("greedy", "modest")) as live:
        greedy, modest, dispatcher = live.client("greedy"), live.client("modest"), live.service.dispatcher
        with greedy.stream(CHAT, chat("@long", max_tokens=3000)) as holder:
            next(holder.events())
            first = Asked(lambda: greedy.post(CHAT, chat("first")))
            until(lambda: dispatcher.waiting == 1, "it waits")
            assert greedy.post(CHAT, chat("second")).code == "queue_full"
            other = Asked(lambda: modest.post(CHAT, chat("other")))
            until(lambda: dispatcher.waiting == 2, "there is room for another")
        assert first.reply().status == other.reply().status == 200


def test_one_user_cannot_keep_the_others_waiting(tmp_path: Path) -> None:
    with LiveServer(tmp_path, parallel=1, keys=("greedy", "modest")) as live:
        dispatcher = live.service.dispatcher
        begun: list[int] = []
        count = dispatcher.on_happened

        def note(message: Happened) -> None:
            begun.extend(number for number, event in message.events if isinstance(event, PrefillEvent))
            count(message)

        dispatcher.on_happened = note
        asked = []
        with live.client("greedy").stream(CHAT, chat("@long", max_tokens=3000)) as holder:
            next(holder.events())
            for number, name in enumerate(["greedy"] * 4 + ["modest"], 1):
                client = live.client(name)
                asked.append(Asked(partial(client.post, CHAT, chat("x"))))
                until(lambda n=number: dispatcher.waiting == n, "it waits")  # type: ignore[misc]
        assert all(one.reply().status == 200 for one in asked)
        assert begun == [0, 1, 5, 2, 3, 4], "the one who came last is second"


def test_limits_of_a_key(tmp_path: Path) -> None:
    with LiveServer(tmp_path) as live:
        few = live.client(live.database.now(add_key, "few", requests_per_minute=2))
        assert [few.post("/", {"prompt": "x"}).status for _ in range(3)] == [200, 200, 429]
        refused = few.post(CHAT, chat("x"))
        assert refused.code == "requests_per_minute"
        assert 1 <= int(refused.headers["retry-after"]) <= 31
        assert few.get("/v1/conversations").status == 200, "looking is free"
        poor = live.client(live.database.now(add_key, "poor", tokens_per_day=100))
        assert [poor.post(CHAT, chat("x")).status for _ in range(2)] == [200, 429]
        assert poor.post("/", {"prompt": "x"}).code == "tokens_per_day"


LONG = {"max_tokens": 3000}
BROKEN_OFF: list[tuple[str, dict[str, Any]]] = [
    (CHAT, chat("@long", **LONG)),
    (CHAT, chat("@long", n=2, **LONG)),
    ("/v1/completions", {"prompt": "and so on " * 30, "ignore_eos": True, **LONG}),
    ("/", {"prompt": "@long", "max_new_tokens": 3000, "max_length": 4000}),
]


@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("path", "body"), BROKEN_OFF)
def test_who_hangs_up_has_used_what_was_computed(
    tmp_path: Path, path: str, body: dict[str, Any], stream: bool, thinks: bool
) -> None:
    """Only an answer that came to its end was charged: a day's tokens lasted forever."""
    begun: list[int] = []
    tools = FindingTools() if thinks else None
    with LiveServer(tmp_path, keys=("alice",), max_new_tokens=3000, tools=tools) as live:
        count = live.service.dispatcher.on_happened

        def note(message: Happened) -> None:
            begun.extend(event.id for _, event in message.events if isinstance(event, TokenEvent))
            count(message)

        live.service.dispatcher.on_happened = note
        line = http.client.HTTPConnection("127.0.0.1", live.port)
        headers = {"Content-Type": "application/json", **live.client("alice").headers}
        line.request("POST", path, json.dumps({**body, "stream": stream}), headers)
        until(lambda: len(begun) > 40, "much is computed")
        line.close()
        until(lambda: not live.server.server_state.tasks, "the request is over")
        prompt = 60 if path == "/v1/completions" else 500
        assert live.database.now(tokens_today, "alice") > prompt + 40


def test_answers_at_once_of_a_key(tmp_path: Path) -> None:
    with LiveServer(tmp_path) as live:
        single = live.client(live.database.now(add_key, "single", parallel=1))
        other = live.client(live.database.now(add_key, "other"))
        with single.stream(CHAT, chat("@long", max_tokens=3000)) as holder:
            next(holder.events())
            second = Asked(lambda: single.post(CHAT, chat("second")))
            until(lambda: live.service.dispatcher.waiting == 1, "the second waits, though there is room")
            assert other.post(CHAT, chat("x")).status == 200
        assert second.reply().status == 200


def test_a_wait_has_an_end(tmp_path: Path) -> None:
    with LiveServer(tmp_path, parallel=1, wait_s=0.1) as live:
        client = live.client()
        with client.stream(CHAT, chat("@long", max_tokens=3000)) as holder:
            next(holder.events())
            reply = client.post(CHAT, chat("x"))
            assert (reply.status, reply.code) == (503, "waited_too_long")
            assert "retry-after" in reply.headers


def test_an_answer_has_an_end(tmp_path: Path) -> None:
    with LiveServer(tmp_path, answer_s=0.1, max_new_tokens=3000) as live:
        choice = live.client().post(CHAT, chat("@long", max_tokens=3000)).json["choices"][0]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["content"].startswith("you said @long")


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_without_a_word_takes_nobodys_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Its time was over while it was thought about: the old answer went, and nothing came."""
    with LiveServer(tmp_path, keys=("alice",), tools=FindingTools()) as live:
        alice = live.client("alice")
        uid = alice.say("one")["uid"]
        monkeypatch.setattr(live.service, "settings", replace(live.settings, answer_s=1e-6))
        for place in ({"uid": uid, "replace_turn": 0}, {"uid": uid}, {}):
            reply = alice.post("/", {"prompt": "two", "stream": stream, **place})
            assert reply.status == (200 if stream else 503)
            assert b'"code": "no_answer"' in reply.body.replace(b'"code":"', b'"code": "')
            assert (b"it should replace is kept" in reply.body) is ("replace_turn" in place)
        (turn,) = alice.get(f"/v1/conversations/{uid}").json["turns"]
        assert (turn["human"], turn["answer"]) == ("one", "you said one")
        assert len(alice.get("/v1/conversations").json["data"]) == 1, "no conversation began"


def test_conversations_of_a_key_have_a_number(tmp_path: Path) -> None:
    with LiveServer(tmp_path, keys=("alice",), conversations=2) as live:
        client = live.client("alice")
        uid = client.say("one")["uid"]
        client.say("two")
        used = live.database.now(tokens_today, "alice")
        for stream in (False, True):
            reply = client.post("/", {"prompt": "three", "stream": stream})
            assert (reply.status, reply.code) == (403, "too_many_conversations")
        assert live.database.now(tokens_today, "alice") == used, "it is told before it is answered"
        client.say("but this one goes on", uid)
        for _ in range(2):
            client.ask("DELETE", f"/v1/conversations/{uid}/turns/last")
        client.say("and begins anew", uid)
        client.ask("DELETE", f"/v1/conversations/{uid}")
        client.say("three")


def test_without_keys_what_was_unused_longest_makes_room(tmp_path: Path) -> None:
    """Nobody could see what there was, nor delete it: after the last one the server took no more."""
    with LiveServer(tmp_path, conversations=2) as live:
        client = live.client()
        one, two = (client.say(text)["uid"] for text in ("one", "two"))
        client.say("and on", one)
        three = client.say("three")["uid"]
        assert [client.get(f"/v1/conversations/{uid}").status for uid in (one, two, three)] == [200, 404, 200]


@pytest.mark.parametrize("stream", [True, False])
def test_the_end_of_a_server_keeps_what_runs(tmp_path: Path, stream: bool) -> None:
    with LiveServer(tmp_path, parallel=1, grace_s=0.2) as live:
        client, dispatcher = live.client(), live.service.dispatcher
        runs = Asked(
            lambda: client.post("/", {"prompt": "@long", "max_new_tokens": 3000, "max_length": 4000, "stream": stream})
        )
        until(lambda: dispatcher.running == 1, "it runs")
        waits = Asked(lambda: client.post("/", {"prompt": "never begun"}))
        until(lambda: dispatcher.waiting == 1, "it waits")
        live.stop()
        assert waits.reply().code == "ending"
        body = runs.reply().body
        assert b"you said @long" in body, "what there was has been sent"
    with LiveServer(tmp_path) as again:
        uid = body.decode().rpartition('"uid":')[2].split('"')[1]
        turns = again.client().get(f"/v1/conversations/{uid}").json["turns"]
        assert [turn["reason"] for turn in turns] == ["time"]
        assert turns[0]["answer"].startswith("you said @long")


def test_short_answers_finish_before_the_end(tmp_path: Path) -> None:
    with LiveServer(tmp_path, grace_s=20) as live:
        client = live.client()
        runs = Asked(lambda: client.post(CHAT, chat("@long", max_tokens=200)))
        until(lambda: live.service.dispatcher.running == 1, "it runs")
        live.stop()
        assert runs.reply().json["choices"][0]["finish_reason"] == "length"
        assert runs.reply().json["usage"]["completion_tokens"] == 200
