"""Running an engine to its end, and reading what it told, for tests."""

from __future__ import annotations

from moss_jt.config import GenerationConfig
from moss_jt.engine import Engine
from moss_jt.generation import generate
from moss_jt.messages import Event, FinishedEvent, TokenEvent
from moss_jt.runner import Model

GREEDY = GenerationConfig(do_sample=False, repetition_penalty=1.0, max_new_tokens=12)


def drain(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while engine.busy:
        events += engine.step()
    return events


def tokens_of(events: list[Event], request: int) -> list[int]:
    return [event.id for event in events if isinstance(event, TokenEvent) and event.request == request]


def finished(events: list[Event], request: int) -> FinishedEvent:
    (event,) = [event for event in events if isinstance(event, FinishedEvent) and event.request == request]
    return event


def alone(model: Model, ids: tuple[int, ...], config: GenerationConfig) -> list[int]:
    return [token.id for token in generate(model, ids, config)]
