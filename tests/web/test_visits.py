"""What acts on the main page lead to, without a browser: values in, values out, on a server with the toy engine."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from finding_tools import PICTURE, FindingTools
from live_server import LiveServer, until

from moss_jt.web import client as client_module
from moss_jt.web.client import Answer, Event, Finished, ServerClient, Started, Wishes
from moss_jt.web.talks import RUNNING, Talk, messages, state_html
from moss_jt.web.visitors import Visitor
from moss_jt.web.visits import Kept, View, chosen, deleted, edited, opened, said, said_again
from moss_jt.web.words import _WORDS, language_of, say


@pytest.fixture
def visitor(toy_server: LiveServer) -> Iterator[Visitor]:
    with ServerClient(f"http://127.0.0.1:{toy_server.port}") as client:
        yield Visitor(client, "a tab", {})


def last(views: Iterator[View]) -> View:
    """The view at the end of an answer."""
    *_, end = views
    assert end.draft is None
    return end


def ask(visitor: Visitor, text: str, view: View | None = None) -> View:
    return last(said(visitor, view or View("en"), text, Wishes()))


def humans(view: View) -> list[str]:
    return [turn.human for turn in view.talk.turns]


def test_an_answer_grows_and_becomes_a_turn(visitor: Visitor) -> None:
    views = list(said(visitor, View("en"), "hello", Wishes()))
    assert views[0].draft is not None and views[0].draft.reason == RUNNING
    assert views[0].text == "", "the words leave the place where they were written"
    end = views[-1]
    assert (end.talk.turns[0].answer, end.talk.title) == ("you said hello", "hello")
    assert end.choices == end.kept.talks == ((end.talk.uid, "hello"),)
    assert end.kept.last == end.talk.uid
    assert not visitor.waits
    assert opened(visitor.client, Kept.from_dict(end.kept.to_dict()), "en").talk.turns[0].human == "hello"


def test_nothing_is_said_while_an_answer_comes(visitor: Visitor) -> None:
    views = said(visitor, View("en"), "wait @hold", Wishes())
    for view in views:
        if view.draft is not None and "you said wait @hold" in view.draft.answer:
            break
    assert visitor.waits
    assert list(said(visitor, View("en"), "and more", Wishes())) == []
    visitor.stop()
    end = last(views)
    assert (end.talk.turns[0].reason, end.talk.turns[0].answer) == ("cancelled", "you said wait @hold")


def test_what_comes_is_shown_though_nothing_follows(visitor: Visitor) -> None:
    """An answer whose next token takes minutes shows the last one now."""
    views = said(visitor, View("en"), "@hold", Wishes())
    shown = (view.draft.answer for view in views if view.draft is not None)
    assert next(text for text in shown if text.endswith("you said @hold"))
    visitor.stop()
    list(views)


def test_leaving_an_answer_ends_it(visitor: Visitor, toy_server: LiveServer) -> None:
    views = said(visitor, View("en"), "@hold", Wishes())
    next(view for view in views if view.draft is not None and view.draft.answer)
    views.close()  # type: ignore[attr-defined]
    until(lambda: toy_server.service.dispatcher.running == 0, "the engine is let go")
    assert not visitor.waits
    assert threading.active_count() < 50


def test_edit_and_retry_take_the_place_of_the_last_turn(visitor: Visitor) -> None:
    view = ask(visitor, "two", ask(visitor, "one"))
    view = last(said_again(visitor, view, Wishes()))
    assert humans(view) == ["one", "two"]
    view = edited(view)
    assert (view.editing, view.text) == (True, "two")
    view = ask(visitor, "three", view)
    assert (humans(view), view.editing) == (["one", "three"], False)
    assert view.talk.uid is not None
    assert [turn.human for turn in visitor.client.conversation(view.talk.uid).turns] == ["one", "three"]


@pytest.mark.parametrize("text", ["@bad", "@bad one"])
def test_a_question_that_fails_takes_nobodys_place(visitor: Visitor, text: str) -> None:
    view = ask(visitor, "one")
    view = ask(visitor, text, replace(view, editing=True))
    assert (humans(view), view.talk.turns[0].answer) == (["one"], "you said one")
    assert (view.text, bool(view.warning)) == (text, True)
    assert opened(visitor.client, view.kept, "en").talk.turns == view.talk.turns


def test_an_answer_anew_that_is_stopped_at_once_leaves_the_old_one(
    visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = ask(visitor, "one")
    begin = Visitor.begin

    def begun_and_stopped(visitor: Visitor, answer: Answer) -> Answer:
        answer.stop()
        return begin(visitor, answer)

    monkeypatch.setattr(Visitor, "begin", begun_and_stopped)
    views = said(visitor, replace(view, editing=True), "two", Wishes())
    assert humans(next(views)) == [], "the old one is not shown meanwhile"
    end = last(views)
    assert (humans(end), end.talk.turns[0].answer, end.text) == (["one"], "you said one", "two")
    assert opened(visitor.client, end.kept, "en").talk.turns == end.talk.turns


def test_a_conversation_that_is_stopped_before_its_first_word_is_not_listed(
    visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stood in the list from its beginning on, and was gone once it was chosen: the server had kept nothing."""
    first = ask(visitor, "one")
    read = Answer.__next__

    def read_and_stop(answer: Answer) -> Event:
        event = read(answer)
        answer.stop()
        return event if isinstance(event, Started) else Finished("a uid", "cancelled", "")

    monkeypatch.setattr(Answer, "__next__", read_and_stop)
    end = ask(visitor, "two", chosen(visitor.client, first, None))
    assert (end.talk, end.text, end.kept.last) == (Talk(), "two", None)
    assert end.choices == end.kept.talks == first.kept.talks


def test_a_turn_that_came_from_elsewhere_is_not_taken_back(visitor: Visitor) -> None:
    view = ask(visitor, "one")
    ask(visitor, "from another tab", view)
    view = last(said_again(visitor, view, Wishes()))
    assert humans(view) == ["one", "from another tab"], "what the server has is what counts"
    assert (view.text, "not 0" in view.warning) == ("one", True)


def test_what_fails_gives_the_words_back(visitor: Visitor) -> None:
    view = ask(visitor, "@bad", ask(visitor, "one"))
    assert (humans(view), view.text) == (["one"], "@bad")
    assert "the toy was asked to fail" in view.warning
    fresh = ask(visitor, "@bad")
    assert (fresh.talk.turns, fresh.text) == ((), "@bad")
    assert humans(ask(visitor, "again", replace(fresh, warning=""))) == ["again"]


def test_a_fault_of_ours_is_told_too(visitor: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread ended without a word, and the page waited for ever, also behind Stop."""

    def fails(line: str) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr(client_module, "_event", fails)
    view = ask(visitor, "hello")
    assert (view.text, "KeyError('a fault')" in view.warning) == ("hello", True)
    assert not visitor.waits


def test_half_a_character_is_left_out(visitor: Visitor) -> None:
    """Neither the server nor Gradio can be sent it."""
    assert humans(ask(visitor, "half \ud83d")) == ["half ?"]


def test_an_answer_that_breaks_off_keeps_what_the_server_kept(visitor: Visitor) -> None:
    view = ask(visitor, "tell me @die")
    assert [(turn.human, turn.reason) for turn in view.talk.turns] == [("tell me @die", "cancelled")]
    assert (view.text, view.choices) == ("", ((view.talk.uid, "tell me @die"),))
    assert view.warning
    assert humans(ask_until_there(visitor, view)) == ["tell me @die", "hello"]


def ask_until_there(visitor: Visitor, view: View) -> View:
    """Say hello once the model has been started again."""
    until(lambda: visitor.client.readiness().ready, "the model is there again")
    return ask(visitor, "hello", replace(view, warning=""))


def test_a_conversation_that_is_gone_is_forgotten(visitor: Visitor) -> None:
    view = ask(visitor, "one")
    assert view.talk.uid is not None
    visitor.client.delete(view.talk.uid)
    for after in (
        ask(visitor, "two", view),
        chosen(visitor.client, view, view.talk.uid),
        deleted(visitor.client, view),
    ):
        assert (after.talk, after.choices, after.kept.talks) == (Talk(), (), ())


def test_a_server_that_is_away_loses_nothing() -> None:
    kept = Kept("zh", "uid", (("uid", "title"),))
    with ServerClient("http://127.0.0.1:9") as client:
        view = opened(client, kept, "zh")
        assert (view.kept.talks, view.choices) == (kept.talks, kept.talks)
        assert "cannot be reached" in view.warning
        away = ask(Visitor(client, "x", {}), "hello")
        assert (away.text, "cannot be reached" in away.warning) == ("hello", True)
        assert "cannot be reached" in state_html(client, "en", speed=0)


@pytest.mark.parametrize(
    "values", [None, 3, [], {"language": "fr", "last": 3, "talks": "x"}, {"talks": [1, [2], ["a", "b", "c"]]}]
)
def test_a_browser_may_send_anything(values: object) -> None:
    assert Kept.from_dict(values) == Kept()


def test_with_a_key_the_server_lists(tmp_path: Path) -> None:
    with LiveServer(tmp_path, keys=("alice",)) as live, contextlib.ExitStack() as stack:
        client = stack.enter_context(ServerClient(f"http://127.0.0.1:{live.port}", live.keys["alice"]))
        view = ask(Visitor(client, "x", {}), "hello")
        assert view.choices == ((view.talk.uid, "hello"),)
        assert view.kept.talks == (), "the browser need not remember"


def test_messages_hold_what_tools_found(tmp_path: Path) -> None:
    with LiveServer(tmp_path, tools=FindingTools()) as live, ServerClient(f"http://127.0.0.1:{live.port}") as client:
        view = ask(Visitor(client, "x", {}), "@search rain<sup><|1|></sup>")
        again = chosen(client, View("zh"), view.talk.uid)
        assert view.talk.pictures == again.talk.pictures
        assert [file.content for file in again.talk.pictures.values()] == [PICTURE]
        said_, thoughts, picture, note, answer = messages(again.talk, "zh")
        assert thoughts["metadata"] == {"title": "思考与工具", "status": "done"}
        assert 'src="data:image/png;base64,' in picture["content"]
        assert "a sketch" in note["content"]
        assert 'href="https://example.org/page"' in answer["content"]
        assert said_["role"] == "user"


def test_every_word_has_both_languages() -> None:
    for key, wordings in _WORDS.items():
        assert all(wordings), key
        fields = [sorted(part.split("}")[0] for part in wording.split("{")[1:]) for wording in wordings]
        assert fields[0] == fields[1], key
    assert say("loading", "zh", task="x", percent=3) == "正在加载模型：x 3 %"


@pytest.mark.parametrize(
    ("accepted", "language"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("ZH", "zh"),
        ("en-US,zh;q=0.5", "en"),
        ("", "en"),
        (None, "en"),
        ("zho", "en"),
    ],
)
def test_a_page_speaks_as_its_browser_asks(accepted: str | None, language: str) -> None:
    assert language_of(accepted) == language
