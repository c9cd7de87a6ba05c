"""What a visitor of the main page does, and what the page shows then: values in, values out.

A View is all that the page shows of conversations; each act gives the next one, and asking gives one after the other
as the answer comes. Without keys the browser remembers which conversations are its own (Kept); with a key the server
lists them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from queue import Empty, Queue

from moss_jt.errors import ServerError
from moss_jt.language import Language
from moss_jt.web.client import Answer, Event, Finished, ServerClient, Started, Turn, Wishes, unforeseen
from moss_jt.web.talks import RUNNING, Talk, advanced, open_talk, with_pictures
from moss_jt.web.visitors import Visitor
from moss_jt.web.words import say

SHOW_S = 0.1  # what comes within it is shown together
_MOST_KEPT = 200  # conversations that a browser remembers
NOT_FOUND = 404


@dataclass(frozen=True)
class Kept:
    """What a browser remembers.

    Attributes:
        last: uid of the conversation that is open.
        talks: (uid, title) of its own, the newest first; empty where the server lists them.
    """

    language: Language | None = None
    last: str | None = None
    talks: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, object]:
        """As the browser keeps it."""
        return {"language": self.language, "last": self.last, "talks": [list(talk) for talk in self.talks]}

    @classmethod
    def from_dict(cls, values: object) -> Kept:
        """What a browser sends back, which may be anything."""
        found = values if isinstance(values, dict) else {}
        language, last, talks = (found.get(name) for name in ("language", "last", "talks"))
        pairs = [tuple(map(str, one)) for one in talks if isinstance(one, list)] if isinstance(talks, list) else []
        return cls(
            language if language in ("en", "zh") else None,
            last if isinstance(last, str) else None,
            tuple((one[0], one[1]) for one in pairs[:_MOST_KEPT] if len(one) == 2),
        )


@dataclass(frozen=True)
class View:
    """What the page shows.

    Attributes:
        choices: (uid, title) of the conversations to choose from.
        draft: the turn that is being answered.
        editing: the next question takes the place of the last.
        text: to put where one writes; None leaves what is there.
        warning: to tell once.
    """

    language: Language
    talk: Talk = field(default_factory=Talk)
    kept: Kept = field(default_factory=Kept)
    choices: tuple[tuple[str, str], ...] = ()
    draft: Turn | None = None
    editing: bool = False
    text: str | None = None
    warning: str = ""


def opened(client: ServerClient, kept: Kept, language: Language) -> View:
    """The page is opened, or opened again: with the conversation that was open."""
    return _listed(client, chosen(client, View(language, kept=kept), kept.last))


def chosen(client: ServerClient, view: View, uid: str | None) -> View:
    """Another conversation, or none yet."""
    view = replace(view, talk=Talk(), editing=False, draft=None)
    if uid is not None:
        try:
            view = replace(view, talk=open_talk(client, uid))
        except ServerError as error:
            view = _failed(client, view, uid, error)
    return replace(view, kept=replace(view.kept, last=view.talk.uid))


def deleted(client: ServerClient, view: View) -> View:
    """The conversation is deleted."""
    uid = view.talk.uid
    if uid is not None:
        try:
            client.delete(uid)
        except ServerError as error:
            if error.status != NOT_FOUND:
                return replace(view, warning=str(error))
        view = _forgotten(view, uid)
    return _listed(client, chosen(client, view, None))


def edited(view: View) -> View:
    """The last question is to be asked in other words."""
    if not view.talk.turns:
        return view
    return replace(view, editing=True, text=view.talk.turns[-1].human)


def said_again(visitor: Visitor, view: View, wishes: Wishes) -> Iterator[View]:
    """The last question is asked once more."""
    if view.talk.turns:
        yield from said(visitor, replace(view, editing=True), view.talk.turns[-1].human, wishes)


def said(visitor: Visitor, view: View, text: str, wishes: Wishes) -> Iterator[View]:
    """Something is said, and answered."""
    if not text.strip() or visitor.waits:
        return
    text = text.encode("utf-8", "replace").decode()  # half a character of a browser can neither be sent nor shown
    client, before = visitor.client, view.talk
    replaces = len(before.turns) - 1 if view.editing and before.turns else None
    view = replace(view, talk=replace(before, turns=before.turns[:replaces]), editing=False)
    try:
        view = replace(view, text="", draft=Turn(text, "", RUNNING))
        yield view
        answer = visitor.begin(client.ask(text, uid=view.talk.uid, wishes=wishes, replaces=replaces))
        view = yield from _answered(client, answer, view, before)
        view = replace(view, talk=with_pictures(client, view.talk))
    except ServerError as error:
        view = _broken(client, view, text, error)
    finally:
        visitor.end()
    yield _listed(client, replace(view, draft=None))


def _answered(client: ServerClient, answer: Answer, view: View, before: Talk) -> Generator[View, None, View]:
    """What is shown while an answer comes; what it returns has the turn as part of the conversation.

    Args:
        before: the conversation until then; a view that answers anew shows it without its last turn.
    """
    draft, kept = view.draft, view.kept
    assert draft is not None, "there is a question"
    speed = 0.0
    try:
        for events in _batches(answer):
            for event in events:
                draft = advanced(draft, event)
                if isinstance(event, Started):
                    view = _remembered(replace(view, talk=replace(view.talk, uid=event.uid)), draft.human)
                elif isinstance(event, Finished):
                    speed = event.tokens_per_s
            view = replace(view, draft=draft)
            if draft.reason == RUNNING:
                yield view
    except ServerError as error:
        return _broken(client, view, draft.human, error)
    if draft.reason == "cancelled" and not draft.answer:  # the server keeps nothing of it
        return replace(view, talk=before, kept=kept, text=draft.human)
    return replace(view, talk=replace(view.talk, turns=(*view.talk.turns, draft), speed=speed))


def _batches(answer: Answer) -> Iterator[list[Event]]:
    """What comes within a moment together: a fast answer is not shown token by token, a slow one at once.

    A thread reads, since who waits for the next event cannot show the last one in time. Closing this ends the answer.
    """
    inbox: Queue[Event | ServerError | None] = Queue()
    reader = threading.Thread(target=_read, args=(answer, inbox), daemon=True)
    reader.start()
    try:
        over = False
        while not over:
            found = _take(inbox)
            over = found[-1] is None or isinstance(found[-1], ServerError)
            yield [event for event in found if event is not None and not isinstance(event, ServerError)]
            if isinstance(found[-1], ServerError):
                raise found[-1]
    finally:
        answer.stop()  # of no effect where it is over
        reader.join()


def _read(answer: Answer, inbox: Queue[Event | ServerError | None]) -> None:
    """A thread: what comes, and None or the error at the end."""
    try:
        for event in answer:
            inbox.put(event)
        inbox.put(None)
    except ServerError as error:
        inbox.put(error)
    except Exception as error:  # who waits for the end would wait for ever
        inbox.put(unforeseen(error))


def _take(inbox: Queue[Event | ServerError | None]) -> list[Event | ServerError | None]:
    """Wait for something, and a moment for what follows it."""
    found = [inbox.get()]
    deadline = time.monotonic() + SHOW_S
    while found[-1] is not None and not isinstance(found[-1], ServerError):
        try:
            found.append(inbox.get(timeout=max(0.0, deadline - time.monotonic())))
        except Empty:
            break
    return found


def _broken(client: ServerClient, view: View, text: str, error: ServerError) -> View:
    """An answer did not come, or broke off: what the server has of the conversation is what counts."""
    turns = len(view.talk.turns)
    uid = view.talk.uid
    if uid is not None:
        try:
            view = replace(view, talk=open_talk(client, uid))
        except ServerError as second:
            view = _failed(client, view, uid, second)
    kept = len(view.talk.turns) > turns and view.talk.turns[-1].human == text
    return replace(view, text="" if kept else text, editing=False, warning=str(error))


def _failed(client: ServerClient, view: View, uid: str, error: ServerError) -> View:
    """A conversation cannot be opened."""
    if error.status != NOT_FOUND:
        return replace(view, warning=str(error))
    view = _listed(client, _forgotten(view, uid))
    return replace(view, talk=Talk(), warning=say("gone", view.language))


def _remembered(view: View, question: str) -> View:
    """A conversation is open, and belongs to this browser."""
    uid = view.talk.uid
    assert uid is not None, "it has begun"
    known = dict(view.kept.talks)
    title = known.pop(uid, " ".join((view.talk.turns[0].human if view.talk.turns else question).split())[:80])
    talks = ((uid, title), *known.items())[:_MOST_KEPT]
    return replace(view, kept=replace(view.kept, last=uid, talks=talks))


def _forgotten(view: View, uid: str) -> View:
    return replace(view, kept=replace(view.kept, talks=tuple(one for one in view.kept.talks if one[0] != uid)))


def _listed(client: ServerClient, view: View) -> View:
    """The list of conversations anew: the server's where there is a key, else the browser's."""
    if not client.has_key:
        return replace(view, choices=view.kept.talks)
    try:
        listed = tuple((one.uid, one.title) for one in client.conversations())
    except ServerError as error:
        return replace(view, warning=view.warning or str(error))
    return replace(view, choices=listed, kept=replace(view.kept, talks=()))
