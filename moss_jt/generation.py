"""generate(): one sequence of ids in, tokens out, one at a time. Knows ids only, no text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import index
from typing import SupportsIndex

from moss_jt.config import GenerationConfig
from moss_jt.engine import Engine
from moss_jt.errors import ShapeError
from moss_jt.messages import FinishedEvent, Request, TokenEvent
from moss_jt.runner import Model


@dataclass(frozen=True)
class Token:
    """A generated token, and the logarithm of the probability that it was drawn with."""

    id: int
    logprob: float


def generate(model: Model, ids: Iterable[SupportsIndex], config: GenerationConfig | None = None) -> Iterator[Token]:
    """Continue a sequence.

    Stops only at the stop ids and strings of the config, its limits of length and time, or where
    the context is full; the token that ends it is the last one given. Closing the iterator ends
    the work.

    Args:
        model: from `load_model`.
        ids: the prompt, at least one token.
        config: how to choose and when to stop; None for the model's defaults.

    Raises:
        ConfigError: the prompt is empty, too long, or holds an id outside the vocabulary.
        ShapeError: `ids` is not one sequence of whole numbers.
    """
    prompt = _whole_numbers(ids)
    engine = Engine(model)
    request = engine.submit(Request(prompt, config or GenerationConfig.for_model(model.config)))
    return _tokens(engine, request)


def _whole_numbers(ids: Iterable[SupportsIndex]) -> tuple[int, ...]:
    """The prompt as ints, whatever kind of whole numbers it holds."""
    try:
        return tuple(index(i) for i in ids)
    except TypeError:
        shown = " ".join(repr(ids)[:80].split())
        raise ShapeError(
            f"ids is {shown}; wanted is one sequence of whole numbers, such as tokenizer.encode gives."
        ) from None


def _tokens(engine: Engine, request: int) -> Iterator[Token]:
    while True:
        for event in engine.step():
            if isinstance(event, TokenEvent) and event.request == request:
                yield Token(event.id, event.logprob)
            elif isinstance(event, FinishedEvent):
                return
