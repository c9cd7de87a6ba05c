"""What all prompts begin with is computed once, and nobody else's text is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from engine_runs import GREEDY, alone, drain, finished, tokens_of

from moss_jt.engine import Engine
from moss_jt.messages import Request
from moss_jt.runner import Model

Load = Callable[[str], Model]


@pytest.fixture
def model(golden_model: Load) -> Model:
    return golden_model("tiny-fp/safetensors-fp16")


SYSTEM = tuple(range(1, 41))  # more than a block


def shared_request(ids: tuple[int, ...], name: str | None) -> Request:
    return Request(ids, GREEDY, name, shared=len(SYSTEM))


def test_what_all_begin_with_is_computed_once(model: Model) -> None:
    """Taken from one that answers, from one that is idle; with the same answers as alone."""
    engine = Engine(model, slots=3, tokens=3 * model.config.n_positions)
    asked = [(*SYSTEM, *range(50 + i, 60 + i)) for i in range(4)]
    first = engine.submit(shared_request(asked[0], "a"))
    events = engine.step()
    numbers = [first, *(engine.submit(shared_request(ids, None)) for ids in asked[1:3])]
    events += drain(engine)
    numbers.append(engine.submit(shared_request(asked[3], "b")))
    events += drain(engine)
    assert [finished(events, number).reused_tokens for number in numbers] == [0, *[len(SYSTEM)] * 3]
    for number, ids in zip(numbers, asked, strict=True):
        assert tokens_of(events, number) == alone(model, ids, GREEDY)


def test_nothing_is_shared_that_was_not_said_to_be(model: Model) -> None:
    """How long a text of somebody else's is cached would tell what it says."""
    engine = Engine(model, slots=2, tokens=2 * model.config.n_positions)
    engine.submit(shared_request((*SYSTEM, 50, 51, 52, 53), "a"))
    drain(engine)
    for shared, reused in ((len(SYSTEM), len(SYSTEM)), (7, 7), (0, 0)):
        number = engine.submit(Request((*SYSTEM, 50, 51, 52, 53), GREEDY, None, shared=shared))
        assert finished(drain(engine), number).reused_tokens == reused
    whole = engine.submit(Request(SYSTEM, GREEDY, None, shared=len(SYSTEM)))
    assert finished(drain(engine), whole).reused_tokens == len(SYSTEM) - 1, "the last one is computed for its logits"


@pytest.mark.parametrize("slots", [1, 2])
def test_who_gives_way_leaves_the_beginning(model: Model, slots: int) -> None:
    engine = Engine(model, slots=slots, tokens=slots * model.config.n_positions)
    other = Request(tuple(range(200, 230)), GREEDY, "other")
    if slots > 1:
        engine.submit(other)
        drain(engine)
    engine.submit(shared_request((*SYSTEM, 60, 61), "a"))
    drain(engine)
    number = engine.submit(shared_request((*SYSTEM, 70, 71), "b"))
    events = drain(engine)
    assert finished(events, number).reused_tokens == len(SYSTEM)
    assert tokens_of(events, number) == alone(model, (*SYSTEM, 70, 71), GREEDY)


def test_a_full_cache_shares_nothing_and_answers_all_the_same(model: Model) -> None:
    """There is no room for a copy beside the one that answers."""
    engine = Engine(model, slots=2, tokens=64)
    asked = [(*SYSTEM, 60 + i) for i in range(2)]
    numbers = [engine.submit(replace(shared_request(asked[0], "a"), config=replace(GREEDY, max_new_tokens=20)))]
    events = engine.step()
    numbers.append(engine.submit(shared_request(asked[1], "b")))
    events += drain(engine)
    assert tokens_of(events, numbers[1]) == alone(model, asked[1], GREEDY)
    assert tokens_of(events, numbers[0]) == alone(model, asked[0], replace(GREEDY, max_new_tokens=20))
