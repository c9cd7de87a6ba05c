"""What the main page shows of a conversation: turns as the messages of a chat, the state of the server as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moss_jt.errors import ServerError
from moss_jt.language import Language
from moss_jt.tools.citations import cited, without_begun
from moss_jt.web.client import (
    Delta,
    Event,
    Figures,
    Finished,
    PictureFile,
    Readiness,
    Results,
    ServerClient,
    Thoughts,
    Turn,
)
from moss_jt.web.rendering import answer_html, parts_html, picture_html, plain_html, sources_html, table_html
from moss_jt.web.words import say

RUNNING = "running"  # reason of a turn that is being answered
_NOTES = {"length": "cut_length", "time": "cut_time", "cancelled": "stopped"}
_TIERS = ("resident", "streamed", "kv", "device", "limit", "vram_limit")
Message = dict[str, Any]


@dataclass(frozen=True)
class Talk:
    """A conversation as a page holds it.

    Attributes:
        uid: None before its first answer has begun.
        turns: those that are over; the server has the same.
        pictures: of these turns, by name; those that could not be had are missing.
        speed: tokens per second of the last answer; 0 where it is not known.
    """

    uid: str | None = None
    turns: tuple[Turn, ...] = ()
    pictures: Mapping[str, PictureFile] = field(default_factory=dict)
    speed: float = 0.0

    @property
    def title(self) -> str:
        """The first question, on one line."""
        return " ".join(self.turns[0].human.split()) if self.turns else ""


def open_talk(client: ServerClient, uid: str) -> Talk:
    """A conversation with its pictures.

    Raises:
        ServerError: there is none.
    """
    turns = client.conversation(uid).turns
    return with_pictures(client, Talk(uid, turns))


def with_pictures(client: ServerClient, talk: Talk) -> Talk:
    """Fetch what pictures are missing."""
    found = dict(talk.pictures)
    for name in (picture.name for turn in talk.turns for picture in turn.pictures):
        if name not in found and talk.uid is not None:
            try:
                found[name] = client.picture(talk.uid, name)
            except ServerError:  # its place says that there was one
                continue
    return replace(talk, pictures=found)


def advanced(draft: Turn, event: Event) -> Turn:
    """A turn that is being answered, with what came."""
    if isinstance(event, Thoughts):
        return replace(draft, thoughts=event.text, commands=event.commands)
    if isinstance(event, Results):
        return replace(draft, results=event.text, sources=event.sources, pictures=event.pictures)
    if isinstance(event, Delta):
        return replace(draft, answer=draft.answer + event.text)
    if isinstance(event, Finished):
        return replace(draft, answer=event.answer, reason=event.reason)
    return draft


def messages(talk: Talk, language: Language, draft: Turn | None = None) -> list[Message]:
    """The messages of a chat: HTML that holds no markup but ours, and thoughts that are folded."""
    turns = (*talk.turns, *([draft] if draft is not None else []))
    return [message for turn in turns for message in _of_turn(turn, talk.pictures, language)]


def _of_turn(turn: Turn, pictures: Mapping[str, PictureFile], language: Language) -> Iterator[Message]:
    yield {"role": "user", "content": plain_html(turn.human, "said")}
    if turn.thoughts or turn.results:
        parts = (("thinks", turn.thoughts), ("commands", turn.commands), ("results", turn.results))
        content = parts_html((say(key, language), text) for key, text in parts if text)
        yield {
            "role": "assistant",
            "content": content,
            "metadata": {"title": say("thoughts", language), "status": "done"},
        }
    for picture in turn.pictures:
        if turn.reason != RUNNING:
            file = pictures.get(picture.name, PictureFile(b"", ""))
            yield _says(picture_html(file.content, file.type, picture.note or say("picture", language)))
            if picture.note and file.content:
                yield _says(plain_html(picture.note, "note"))
    yield _says(_answer(turn, language))


def _answer(turn: Turn, language: Language) -> str:
    if turn.reason == RUNNING:
        text = without_begun(turn.answer)
        return answer_html(text, turn.sources) if text else plain_html(say("waiting", language), "note")
    html = answer_html(turn.answer, turn.sources)
    numbers = cited(turn.answer)
    html += sources_html(source for source in turn.sources if source.number in numbers)
    note = _NOTES.get(turn.reason)
    return html + plain_html(say(note, language), "note") if note else html


def _says(html: str) -> Message:
    return {"role": "assistant", "content": html}


def state_html(client: ServerClient, language: Language, *, speed: float) -> str:
    """What the server does now; why it cannot be asked, where it cannot.

    Args:
        speed: of the last answer, tokens per second; 0 where it is not known.
    """
    try:
        readiness = client.readiness()
        if not readiness.ready:
            return plain_html(_loading(readiness, language), "note")
        return table_html(rows_of(client.figures(), language, speed))
    except ServerError as error:
        return plain_html(str(error), "note")


def _loading(readiness: Readiness, language: Language) -> str:
    return say("loading", language, task=readiness.task, percent=round(100 * readiness.share))


def rows_of(figures: Figures, language: Language, speed: float) -> Iterator[tuple[str, str]]:
    """What a server does now, as names and values."""
    yield say("model", language), figures.model
    known = speed or figures.tokens_per_s
    yield say("speed", language), say("tokens_per_s", language, value=f"{known:.1f}") if known else "–"
    yield say("queue", language), say("queued", language, running=figures.running, waiting=figures.waiting)
    yield say("tools", language), ", ".join(figures.tools) or say("no_tools", language)
    for tier in _TIERS:
        if figures.memory.get(tier):
            yield say(tier, language), _size(figures.memory[tier])


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
