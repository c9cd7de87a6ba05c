"""Questions that are asked in a thread, on a real server with the toy engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from live_server import LiveServer, until

from moss_jt.web import asking
from moss_jt.web import client as client_module
from moss_jt.web.asking import Asked, Asking
from moss_jt.web.client import ServerClient, Wishes


@pytest.fixture
def client(toy_server: LiveServer) -> Iterator[ServerClient]:
    with ServerClient(f"http://127.0.0.1:{toy_server.port}") as client:
        yield client


def when(asking: Asking, condition: Callable[[Asked], bool]) -> Asked:
    """What is there once a condition holds."""
    until(lambda: condition(asking.look()), "what was waited for")
    return asking.look()


def over(asking: Asking) -> Asked:
    return when(asking, lambda asked: asked.over)


def ask(client: ServerClient, text: str, uid: str | None = None, number: int = 0, instead: bool = False) -> Asking:
    return Asking(client, text, uid=uid, number=number, wishes=Wishes(), instead=instead)


def test_an_answer_comes_and_is_kept(client: ServerClient) -> None:
    asked = over(ask(client, "hello"))
    assert (asked.turn.human, asked.turn.answer, asked.turn.reason) == ("hello", "you said hello", "stop")
    assert asked.begun and asked.kept and not asked.error and asked.uid is not None
    assert [turn.answer for turn in client.conversation(asked.uid).turns] == ["you said hello"]


def test_what_had_come_of_a_stopped_answer_is_kept_when_it_is_over(client: ServerClient) -> None:
    first = over(ask(client, "hello"))
    asking = ask(client, "more @hold", first.uid, 1)
    when(asking, lambda asked: asked.turn.answer == "you said more @hold")
    asking.stop()
    asked = over(asking)
    assert asked.kept and asked.turn.reason == "cancelled"
    assert asked.uid is not None and len(client.conversation(asked.uid).turns) == 2


def test_a_question_takes_the_place_of_the_last(client: ServerClient) -> None:
    first = over(ask(client, "one"))
    over(ask(client, "two", first.uid, 1))
    asked = over(ask(client, "three", first.uid, 1, instead=True))
    assert asked.uid is not None and asked.kept
    assert [turn.human for turn in client.conversation(asked.uid).turns] == ["one", "three"]


def test_of_two_that_take_the_place_of_one_turn_the_second_does_nothing(client: ServerClient) -> None:
    first = over(ask(client, "one"))
    asked = over(ask(client, "two", first.uid, 3, instead=True))
    assert asked.error and not asked.kept
    assert first.uid is not None
    assert [turn.human for turn in client.conversation(first.uid).turns] == ["one"]


def test_a_question_that_fails_leaves_the_turn_whose_place_it_wanted(client: ServerClient) -> None:
    first = over(ask(client, "one"))
    asked = over(ask(client, "@bad", first.uid, 0, instead=True))
    assert asked.error and not asked.kept
    assert first.uid is not None
    assert [turn.answer for turn in client.conversation(first.uid).turns] == ["you said one"]


def test_what_had_come_takes_the_place_when_it_is_stopped(client: ServerClient) -> None:
    first = over(ask(client, "one"))
    asking = ask(client, "@hold one", first.uid, 0, instead=True)
    when(asking, lambda asked: asked.turn.answer == "you said @hold one")
    asking.stop()
    assert over(asking).kept
    assert first.uid is not None
    assert [turn.answer for turn in client.conversation(first.uid).turns] == ["you said @hold one"]


def test_an_error_is_told_in_the_servers_words(client: ServerClient) -> None:
    asked = over(ask(client, "@bad"))
    assert asked.error == "the toy was asked to fail."
    assert asked.over and not asked.kept and asked.turn.human == "@bad"


def test_a_fault_of_ours_is_told_too(client: ServerClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread ended without a word, and the page looked for ever."""

    def fails(line: str) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr(client_module, "_event", fails)
    asked = over(ask(client, "hello"))
    assert "KeyError('a fault')" in asked.error and not asked.kept


def test_an_answer_that_nobody_looks_at_ends(
    client: ServerClient, toy_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "UNSEEN_S", 0.0)
    asked = over(ask(client, "@long", number=0))
    assert asked.turn.reason == "cancelled"
    until(lambda: toy_server.service.dispatcher.running == 0, "the engine is free")
