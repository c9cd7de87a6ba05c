"""The client of the pages against a real server with the toy engine."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finding_tools import PICTURE, FindingTools
from live_server import LiveServer, until
from local_server import serving

from moss_jt.errors import ServerError
from moss_jt.web.client import (
    Delta,
    Event,
    Finished,
    PictureFile,
    Readiness,
    Results,
    ServerClient,
    Source,
    Started,
    Thoughts,
    Wishes,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(tmp_path_factory.mktemp("client"), tools=FindingTools()) as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[ServerClient]:
    with ServerClient(f"http://127.0.0.1:{server.port}") as made:
        yield made


@pytest.fixture
def toy(toy_server: LiveServer) -> Iterator[ServerClient]:
    """Of a server without tools, where an answer begins at once."""
    with ServerClient(f"http://127.0.0.1:{toy_server.port}") as made:
        yield made


def ask(client: ServerClient, text: str, uid: str | None = None, wishes: Wishes | None = None) -> list[Event]:
    """A whole answer."""
    with client.ask(text, uid=uid, wishes=wishes or Wishes()) as answer:
        return list(answer)


def uid_of(events: list[Event]) -> str:
    """The conversation of an answer."""
    last = events[-1]
    assert isinstance(last, Finished) and last.uid is not None
    return last.uid


def test_an_answer_comes_in_order_and_is_kept(client: ServerClient) -> None:
    events = ask(client, "hello")
    started, thoughts, results, *deltas, finished = events
    assert isinstance(started, Started) and isinstance(finished, Finished)
    assert thoughts == Thoughts("I think", "None")
    assert results == Results(None)
    assert "".join(delta.text for delta in deltas if isinstance(delta, Delta)) == finished.answer == "you said hello"
    assert (finished.uid, finished.reason) == (started.uid, "stop")
    assert finished.tokens_per_s > 0
    (turn,) = client.conversation(started.uid).turns
    assert (turn.human, turn.answer, turn.reason) == ("hello", "you said hello", "stop")


def test_sources_and_pictures_are_told_and_kept(client: ServerClient) -> None:
    events = ask(client, "@search rain")
    (results,) = [event for event in events if isinstance(event, Results)]
    assert results.sources == (Source(1, "A page", "https://example.org/page"), Source(2, "A book", ""))
    uid = uid_of(events)
    (turn,) = client.conversation(uid).turns
    assert (turn.sources, turn.pictures, turn.results) == (results.sources, results.pictures, results.text)
    assert client.picture(uid, turn.pictures[0].name) == PictureFile(PICTURE, "image/png")


def test_wishes_reach_the_model(client: ServerClient) -> None:
    *_, finished = ask(client, "@long story", wishes=Wishes(max_new_tokens=30))
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.new_tokens) == ("length", 30)


def test_a_wish_that_cannot_be_is_refused_in_the_words_of_the_server(client: ServerClient) -> None:
    with pytest.raises(ServerError, match="temperature") as refused:
        ask(client, "hello", wishes=Wishes(temperature=-1))
    assert refused.value.status == 400


def test_a_turn_is_taken_back_and_said_anew(client: ServerClient) -> None:
    uid = uid_of(ask(client, "one"))
    ask(client, "two", uid)
    with pytest.raises(ServerError) as refused:
        client.take_back(uid, number=0)
    assert (refused.value.status, refused.value.code) == (409, "not_the_last")
    assert client.take_back(uid, number=1) == "two"
    ask(client, "three", uid)
    assert [turn.human for turn in client.conversation(uid).turns] == ["one", "three"]


def test_stopping_from_another_thread_ends_at_once_and_keeps_what_had_come(
    toy_server: LiveServer, toy: ServerClient
) -> None:
    events: list[Event] = []
    answer = toy.ask("@long story", uid=None, wishes=Wishes(max_new_tokens=100_000))
    reader = threading.Thread(target=lambda: events.extend(answer))
    reader.start()
    until(lambda: toy_server.service.dispatcher.running > 0, "it runs")
    until(lambda: sum(isinstance(event, Delta) for event in events) > 3, "it tells")
    answer.stop()
    reader.join(30)
    assert not reader.is_alive()
    last = events[-1]
    assert isinstance(last, Finished) and last.uid is not None
    assert last.reason == "cancelled"
    until(lambda: toy_server.service.dispatcher.running == 0, "the engine is let go")
    toy.take_back(last.uid, number=0)  # waits until the turn is in the store


def test_an_answer_is_stopped_before_it_began(client: ServerClient) -> None:
    answer = client.ask("@long story", uid=None, wishes=Wishes())
    answer.stop()
    assert list(answer) == [Finished(None, "cancelled", "")]


def anonymous_tls(side: int) -> ssl.SSLContext:
    """TLS that needs no certificate."""
    context = ssl.SSLContext(side)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("aNULL:@SECLEVEL=0")
    return context


@contextlib.contextmanager
def holding_over_tls() -> Iterator[str]:
    """The address of a server whose one answer begins and never goes on."""
    may_end = threading.Event()

    def hold() -> None:
        plain, _ = listener.accept()
        with anonymous_tls(ssl.PROTOCOL_TLS_SERVER).wrap_socket(plain, server_side=True) as line:
            line.recv(1 << 16)
            line.sendall(b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\ndata: {"type": "start", "uid": "u"}\n\n')
            assert may_end.wait(60)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=hold)
        thread.start()
        try:
            yield f"https://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            may_end.set()
            thread.join(60)


def test_stopping_ends_at_once_over_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket beneath was shut down, which TLS had taken the place of: nothing happened."""
    monkeypatch.setattr(ssl, "create_default_context", lambda: anonymous_tls(ssl.PROTOCOL_TLS_CLIENT))
    with holding_over_tls() as url, ServerClient(url) as client:
        events: list[Event] = []
        answer = client.ask("hello", uid=None, wishes=Wishes())
        reader = threading.Thread(target=lambda: events.extend(answer), daemon=True)
        reader.start()
        until(lambda: bool(events), "it begins")
        answer.stop()
        reader.join(20)
        assert events == [Started("u"), Finished("u", "cancelled", "")]


@pytest.mark.parametrize("text", ["one\u2028two", "one\u2029two", "one\x85two", "one\x0b\x0c\x1c\x1d\x1etwo"])
def test_an_answer_may_hold_what_some_take_for_the_end_of_a_line(toy: ServerClient, text: str) -> None:
    """The line was cut there, and what was left of it was no JSON."""
    *_, finished = ask(toy, text)
    assert isinstance(finished, Finished) and finished.answer == f"you said {text}"
    line = json.dumps({"type": "delta", "text": text}, ensure_ascii=False)  # as a server wrote it before
    with serving() as older:
        older.routes["/"] = (200, f"data: {line}\r\n\r\ndata: [DONE]\r\n\r\n".encode())
        with ServerClient(older.url) as client, client.ask("hello", uid=None, wishes=Wishes()) as answer:
            assert next(answer) == Delta(text)
            with pytest.raises(ServerError, match="the answer broke off"):
                next(answer)


def test_what_is_no_event_is_an_error_of_the_server() -> None:
    with serving() as other:
        other.routes["/"] = (200, b"data: <html>\n\n")
        with ServerClient(other.url) as client, pytest.raises(ServerError, match=r"sent what is no event: .* proxy"):
            ask(client, "hello")


def test_half_a_character_is_refused(toy: ServerClient) -> None:
    with pytest.raises(ServerError, match=r"'\\ud83d' in the question is half a character"):
        ask(toy, "half \ud83d")


def test_leaving_an_answer_ends_it_on_the_server(toy_server: LiveServer, toy: ServerClient) -> None:
    with toy.ask("@long story", uid=None, wishes=Wishes(max_new_tokens=100_000)) as answer:
        uid = next(event.uid for event in answer if isinstance(event, Started))
        next(event for event in answer if isinstance(event, Delta))
    until(lambda: toy_server.service.dispatcher.running == 0, "the engine is let go")
    assert toy.take_back(uid, number=0) == "@long story"


def test_an_error_behind_the_beginning_is_raised_too(client: ServerClient) -> None:
    with pytest.raises(ServerError, match="the toy was asked to fail"):
        ask(client, "@bad")


def test_an_unknown_conversation_is_told(client: ServerClient) -> None:
    for what in (client.conversation, client.delete, client.take_back, client.export):
        with pytest.raises(ServerError, match="no conversation with this uid") as refused:
            what("no such?x=#y")
        assert (refused.value.status, refused.value.code) == (404, "unknown_uid")


def test_a_uid_leads_to_no_other_route(client: ServerClient) -> None:
    with pytest.raises(ServerError) as refused:
        client.export("../../healthz")
    assert refused.value.status == 404


def test_a_conversation_is_exported_and_deleted(client: ServerClient) -> None:
    uid = uid_of(ask(client, "你好"))
    assert "你好" in client.export(uid)
    assert json.loads(client.export(uid))["turns"][0]["answer"] == "you said 你好"
    client.delete(uid)
    with pytest.raises(ServerError):
        client.conversation(uid)


def test_readiness_and_figures(client: ServerClient) -> None:
    ask(client, "hello")
    assert client.readiness() == Readiness(True)
    figures = client.figures()
    assert (figures.model, figures.context_size, figures.longest_answer) == ("toy", 4096, 2048)
    assert (figures.tools, figures.user, figures.lists) == (("search",), "", False)
    assert figures.memory["resident"] == 1 << 20
    assert figures.wishes == Wishes(), "the toy says nothing of its own"


def test_figures_tell_how_the_model_is_best_asked(client: ServerClient, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {**client._get("/v1/figures"), "sampling": {"temperature": 0.0, "repetition_penalty": 1.0}}
    monkeypatch.setattr(client, "_get", lambda _: found)
    assert client.figures().wishes == Wishes(temperature=0.0, repetition_penalty=1.0)
    monkeypatch.setattr(client, "_get", lambda _: {**found, "sampling": {}})
    assert client.figures().wishes == Wishes(), "it is being loaded"


def test_without_keys_nothing_is_listed(client: ServerClient) -> None:
    with pytest.raises(ServerError, match="conversations are not listed"):
        client.conversations()


def test_a_key_opens_and_lists(tmp_path: Path) -> None:
    with LiveServer(tmp_path, keys=("alice",)) as live:
        url = f"http://127.0.0.1:{live.port}/"
        with ServerClient(url) as nobody, pytest.raises(ServerError, match="a key of this server is needed"):
            nobody.figures()
        with ServerClient(url, live.keys["alice"]) as alice:
            ask(alice, "hello")
            assert [(one.title, one.turns) for one in alice.conversations()] == [("hello", 1)]
            assert (alice.figures().user, alice.figures().lists) == ("alice", True)


def test_a_server_that_is_not_there() -> None:
    with ServerClient("http://127.0.0.1:9") as client:
        for what in (client.readiness, client.figures):
            with pytest.raises(ServerError, match=r"cannot be reached: .* Does `moss-jt serve` run there"):
                what()
        with pytest.raises(ServerError, match="cannot be reached"):
            ask(client, "hello")


@pytest.mark.parametrize("url", ["", "localhost", "ftp://x", "http://", "http://[::1"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ServerError, match="is no address of a server"):
        ServerClient(url)


@pytest.mark.parametrize("answer", [(404, b"nothing here"), (200, b"<html>"), (500, {"error": "no"})])
def test_something_else_that_listens(answer: tuple[int, Any]) -> None:
    with serving() as other:
        other.routes["/v1/figures"] = answer
        with ServerClient(other.url) as client, pytest.raises(ServerError, match="is it a server of moss-jt"):
            client.figures()
