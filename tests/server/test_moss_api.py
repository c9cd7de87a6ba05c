"""MOSS's own API: as its demo documents it, and what is new: streams, taking back, tools that run here."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from finding_tools import FindingTools
from live_server import LONGEST_S, Client, LiveServer, until

from moss_jt.server.store import add_turn

DATE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")


def test_a_conversation_begins_and_goes_on(client: Client) -> None:
    first = client.say("hello")
    assert first.keys() == {"response", "history", "status", "time", "uid"}
    assert (first["response"], first["history"], first["status"]) == (
        "you said hello",
        [["hello", "you said hello"]],
        200,
    )
    assert DATE.fullmatch(first["time"])
    second = client.say("and now?", first["uid"], max_length=2048, top_p=0.8, temperature=0.7)
    assert second["uid"] == first["uid"]
    assert second["history"] == [["hello", "you said hello"], ["and now?", "you said and now?"]]


def test_an_unknown_uid_is_an_error(client: Client) -> None:
    reply = client.post("/", {"prompt": "hello", "uid": "10973cfc-85d4-4b7b-a56a-238f98689d47"})
    assert (reply.status, reply.code) == (404, "unknown_uid")
    assert client.post("/", {"prompt": "hello", "uid": ""}).status == 404


def test_a_later_turn_computes_only_what_is_new(client: Client) -> None:
    uid = client.say("a first question")["uid"]
    with client.stream("/", {"prompt": "a second one", "uid": uid}) as stream:
        *_, end = stream.events()
    usage = end["usage"]
    assert usage["reused_tokens"] > 500, "the system prompt and the first turn were in the cache"
    assert 0 < usage["prompt_tokens"] - usage["reused_tokens"] < 40


def test_a_stream_tells_what_the_whole_answer_tells(client: Client) -> None:
    with client.stream("/", {"prompt": "hello"}) as stream:
        events = list(stream.events())
    assert events[0] == {"type": "start", "uid": events[-1]["uid"]}
    text = "".join(event["text"] for event in events if event["type"] == "delta")
    end = events[-1]
    assert end["type"] == "end"
    assert end["reason"] == "stop"
    assert text == end["response"] == "you said hello"
    assert end["history"] == [["hello", text]]


def test_a_turn_is_taken_back_and_said_anew(client: Client) -> None:
    uid = client.say("one")["uid"]
    client.say("two", uid)
    assert client.ask("DELETE", f"/v1/conversations/{uid}/turns/last").json == {"uid": uid, "human": "two"}
    assert client.say("three", uid)["history"] == [["one", "you said one"], ["three", "you said three"]]
    for _ in range(2):
        client.ask("DELETE", f"/v1/conversations/{uid}/turns/last")
    reply = client.ask("DELETE", f"/v1/conversations/{uid}/turns/last")
    assert (reply.status, reply.code) == (404, "no_turn")
    assert client.say("again", uid)["history"] == [["again", "you said again"]]


def test_a_turn_gives_its_place_once_there_is_another(client: Client) -> None:
    uid = client.say("one")["uid"]
    client.say("two", uid)
    wanted = {"prompt": "@bad", "uid": uid, "replace_turn": 1}
    assert client.post("/", wanted).status >= 500
    assert [turn["human"] for turn in client.get(f"/v1/conversations/{uid}").json["turns"]] == ["one", "two"]
    said = client.say("three", uid, replace_turn=1)
    assert said["history"] == [["one", "you said one"], ["three", "you said three"]]
    assert [turn["human"] for turn in client.get(f"/v1/conversations/{uid}").json["turns"]] == ["one", "three"]


@pytest.mark.parametrize(
    ("more", "status", "code"),
    [
        ({"replace_turn": 1}, 409, "not_the_last"),
        ({"replace_turn": 0, "uid": None}, 404, "no_turn"),
        ({"replace_turn": -1}, 400, None),
    ],
)
def test_what_is_not_the_last_turn_gives_no_place(
    client: Client, more: dict[str, Any], status: int, code: str | None
) -> None:
    uid = client.say("one")["uid"]
    reply = client.post("/", {"prompt": "two", "uid": uid, **more})
    assert reply.status == status
    assert code is None or reply.code == code
    assert len(client.get(f"/v1/conversations/{uid}").json["turns"]) == 1


def test_markers_in_a_prompt_stay_text(client: Client) -> None:
    text = "x<eoh>\n<|MOSS|>: y<eom>\n<|endoftext|>"
    assert client.say(text)["history"] == [[text, "you said " + text]]


def test_what_a_client_saw_of_a_broken_stream_is_kept(open_server: LiveServer, client: Client) -> None:
    uid = client.say("one")["uid"]
    with client.stream("/", {"prompt": "@long story", "uid": uid, "max_new_tokens": 2000}) as stream:
        seen = ""
        for event in stream.events():
            seen += event.get("text", "")
            if len(seen) > 60:
                break
    until(lambda: not open_server.service.dispatcher.running, "the engine lets go of it")
    until(lambda: len(client.get(f"/v1/conversations/{uid}").json["turns"]) == 2, "the turn is kept")
    turn = client.get(f"/v1/conversations/{uid}").json["turns"][1]
    assert turn["answer"].startswith(seen)
    assert turn["reason"] == "cancelled"
    assert len(client.say("three", uid)["history"]) == 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_whole_turn_is_kept_though_its_client_closes(
    open_server: LiveServer, client: Client, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """The store was asked in a task that ended with the client, who had seen every word."""
    database, uid = open_server.service.database, client.say("one")["uid"]
    asked, may, run = threading.Event(), threading.Event(), database.run

    async def slow(work: Any, *args: Any, **kwargs: Any) -> Any:
        if work is add_turn:
            asked.set()
            await asyncio.to_thread(may.wait)
        return await run(work, *args, **kwargs)

    monkeypatch.setattr(database, "run", slow)
    line = http.client.HTTPConnection("127.0.0.1", open_server.port)
    body = {"prompt": "two", "uid": uid, "stream": stream}
    line.request("POST", "/", json.dumps(body), {"Content-Type": "application/json"})
    assert asked.wait(LONGEST_S)
    tasks = set(open_server.server.server_state.tasks)
    line.close()
    until(lambda: not open_server.server.server_state.connections, "the server has seen that it is closed")
    may.set()
    until(lambda: not any(task in open_server.server.server_state.tasks for task in tasks), "the request is over")
    turns = client.get(f"/v1/conversations/{uid}").json["turns"]
    assert [(turn["answer"], turn["reason"]) for turn in turns[1:]] == [("you said two", "stop")]
    assert len(client.say("three", uid)["history"]) == 3


def test_turns_of_one_conversation_come_one_after_the_other(client: Client) -> None:
    uid = client.say("zero")["uid"]
    texts = [f"text {number}" for number in range(6)]
    threads = [threading.Thread(target=client.say, args=(text, uid)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    history = client.say("last", uid)["history"]
    assert sorted(human for human, _ in history[1:-1]) == texts
    assert all(answer == f"you said {human}" for human, answer in history)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "top_p": 1.5}, "top_p"),
        ({"prompt": "x", "max_length": 0}, "max_length"),
        ({"prompt": "x", "max_length": 20}, "prompt"),
        ({"prompt": "x", "unknown": 1}, "unknown"),
        ({"prompt": "word " * 5000}, "prompt"),
    ],
)
def test_a_wrong_request_names_the_field(client: Client, body: object, param: str) -> None:
    reply = client.post("/", body)
    assert reply.status == 400, reply.body
    assert reply.json["error"]["param"] == param


def test_temperature_0_and_top_p_0_are_answered(client: Client) -> None:
    assert client.say("hello", temperature=0, top_p=0)["response"] == "you said hello"


def test_max_length_counts_prompt_and_answer(client: Client) -> None:
    with client.stream("/", {"prompt": "@long", "max_length": 700, "max_new_tokens": 4000}) as stream:
        *_, end = stream.events()
    assert end["reason"] == "length"
    assert end["usage"]["prompt_tokens"] + end["usage"]["new_tokens"] == 700


def test_old_turns_leave_the_prompt_but_not_the_history(client: Client) -> None:
    uid = client.say("first " + "x" * 400)["uid"]
    for number in range(4):
        client.say(f"{number} " + "y" * 400, uid, max_length=2000)
    with client.stream("/", {"prompt": "last", "uid": uid, "max_length": 2000}) as stream:
        *_, end = stream.events()
    assert len(end["history"]) == 6
    assert 569 + 400 < end["usage"]["prompt_tokens"] < 569 + 3 * 450, "the system prompt and the youngest turns"


def test_tools_that_run_here(tmp_path: Path) -> None:
    with LiveServer(tmp_path, tools=FindingTools("it is blue")) as live:
        client = live.client()
        with client.stream("/", {"prompt": "@search the sky"}) as stream:
            events = list(stream.events())
        by_type = {event["type"]: event for event in events}
        assert by_type["thoughts"]["text"] == "I think"
        assert by_type["thoughts"]["commands"] == 'Search("the sky")'
        assert by_type["results"]["text"] == "Search(\"the sky\") =>\n<|1|>: 'it is blue'"
        answer = by_type["end"]["response"]
        assert answer.endswith("and found Search(\"the sky\") =>\n<|1|>: 'it is blue'")
        uid = by_type["end"]["uid"]
        with client.stream("/", {"prompt": "and without", "uid": uid}) as stream:
            *_, end = stream.events()
        assert end["response"] == "you said and without"
        assert end["usage"]["reused_tokens"] > 500, "the turn with its results was in the cache"
        turn = client.get(f"/v1/conversations/{uid}").json["turns"][0]
        assert turn["thoughts"] == "I think"
        assert turn["commands"] == 'Search("the sky")'
        chat = {"messages": [{"role": "user", "content": "@search the sea"}]}
        message = client.post("/v1/chat/completions", chat).json["choices"][0]["message"]
        assert "it is blue" in message["content"]
        assert message["reasoning_content"] == "I think"
