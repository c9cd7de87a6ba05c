"""Chat sessions whose engine gives scripted answers, for tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fake_engine import FakeEngine

from moss_jt.chat import ChatEvent, ChatSession, Finished, TextDelta
from moss_jt.config import GenerationConfig
from moss_jt.template import Template
from moss_jt.tokenizer import Tokenizer

README = Template("readme")
FIELDS = Template("fields")


def script(tokenizer: Tokenizer, text: str, *, end: bool = True) -> list[int]:
    """What a model generates for an answer."""
    return tokenizer.encode(" " + text) + ([tokenizer.marker("<eom>")] if end else [])


def make(
    tokenizer: Tokenizer, *answers: str | list[int], template: Template = README, size: int = 2048, **settings: Any
) -> tuple[ChatSession, FakeEngine]:
    """A session whose engine will give these answers, with a short system prompt."""
    scripts = [script(tokenizer, a) if isinstance(a, str) else a for a in answers]
    engine = FakeEngine(scripts, context_size=size, last=tokenizer.marker("<eom>"))
    config = GenerationConfig(**settings)
    return ChatSession(engine, tokenizer, template, system="Be brief.", config=config), engine  # type: ignore[arg-type]


def text_of(events: Iterable[ChatEvent]) -> str:
    """What is shown."""
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def finish(events: Iterable[ChatEvent]) -> Finished:
    """The last event, which must be Finished, and the only one of its kind."""
    every = list(events)
    assert [isinstance(event, Finished) for event in every].index(True) == len(every) - 1
    last = every[-1]
    assert isinstance(last, Finished)
    return last
