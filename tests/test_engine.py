"""Engine: batches change nothing, caches are reused, and whatever is broken off leaves no trace."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from engine_runs import GREEDY, alone, drain, finished, tokens_of

from moss_jt.batch import Batch
from moss_jt.engine import Engine
from moss_jt.errors import CheckpointError, ConfigError, KernelError, ShapeError
from moss_jt.generation import generate
from moss_jt.load import load_model
from moss_jt.messages import Event, PrefillEvent, Request, TokenEvent
from moss_jt.plan import PASS_TOKENS
from moss_jt.runner import Floats, Model

Load = Callable[[str], Model]


@pytest.fixture
def model(golden_model: Load) -> Model:
    return golden_model("tiny-fp/safetensors-fp16")


def prompts(model: Model, count: int) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(7)
    sizes = rng.integers(1, 60, count)
    return [tuple(rng.integers(model.config.vocab_size, size=size).tolist()) for size in sizes]


@pytest.mark.parametrize("sample", [False, True])
def test_a_batch_answers_as_each_alone(model: Model, sample: bool) -> None:
    """Joining and leaving in the middle, more requests than slots, long prompts cut over several passes."""
    asked = [
        Request(ids, replace(GREEDY, do_sample=sample, seed=100 + i, max_new_tokens=3 + i))
        for i, ids in enumerate(prompts(model, 9))
    ]
    asked.append(Request(tuple([5, 9, 11] * (PASS_TOKENS // 6 + 1)), replace(GREEDY, do_sample=sample, seed=1)))
    engine = Engine(model, slots=4, tokens=4 * model.config.n_positions)
    events: list[Event] = []
    numbers = [engine.submit(request) for request in asked[:5]]
    for _ in range(3):
        events += engine.step()
    numbers += [engine.submit(request) for request in asked[5:]]
    events += drain(engine)
    for number, request in zip(numbers, asked, strict=True):
        assert tokens_of(events, number) == alone(model, request.ids, request.config)
    assert engine.stats()["cached_tokens"] == 0


def test_scores_are_those_of_the_model_alone(model: Model) -> None:
    config = replace(GREEDY, do_sample=True, seed=4, temperature=3.0, top_k=5, repetition_penalty=1.5)
    engine = Engine(model, slots=2, tokens=2 * model.config.n_positions)
    ids = (3, 5, 8, 13)
    with_scores = engine.submit(Request(ids, config, top_logprobs=3))
    without = engine.submit(Request(ids, config))
    events = drain(engine)
    assert tokens_of(events, with_scores) == tokens_of(events, without)
    given = [event for event in events if isinstance(event, TokenEvent) and event.request == with_scores]
    logits = model.logits([*ids, *(event.id for event in given)])[0].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for place, event in enumerate(given, len(ids) - 1):
        assert event.scores is not None
        assert event.scores.logprob == pytest.approx(expected[place, event.id], abs=1e-4)
        assert [i for i, _ in event.scores.best] == np.argsort(-expected[place])[:3].tolist()
    assert all(event.scores is None for event in events if isinstance(event, TokenEvent) and event.request == without)


def test_a_wrong_number_of_scores_is_refused(model: Model) -> None:
    for wrong in (-1, model.config.vocab_size + 1):
        with pytest.raises(ConfigError, match="top_logprobs"):
            Engine(model).submit(Request((1,), GREEDY, top_logprobs=wrong))


def test_the_same_seed_draws_the_same(model: Model) -> None:
    config = replace(GREEDY, do_sample=True, temperature=1.5, top_k=0, top_p=1.0)
    one, two = (alone(model, (1, 2, 3), replace(config, seed=11)) for _ in range(2))
    assert one == two != alone(model, (1, 2, 3), replace(config, seed=12))


def test_second_turn_computes_only_what_is_new(model: Model) -> None:
    engine = Engine(model)
    first = tuple(range(1, 31))
    one = engine.submit(Request(first, GREEDY, "talk"))
    events = drain(engine)
    answer = tokens_of(events, one)
    second = (*first, *answer, 7, 8, 9)
    two = engine.submit(Request(second, GREEDY, "talk"))
    events = drain(engine)
    done = finished(events, two)
    # the last token of the answer was never fed to the network, so it is new as well
    assert done.reused_tokens == len(first) + len(answer) - 1
    assert [e.done for e in events if isinstance(e, PrefillEvent)] == [done.reused_tokens, len(second)]
    assert tokens_of(events, two) == alone(model, second, GREEDY)


def test_idle_conversations_keep_no_more_than_they_may(model: Model) -> None:
    engine = Engine(model, slots=4, tokens=4 * model.config.n_positions, idle_tokens=50)
    config = replace(GREEDY, max_new_tokens=1)
    reused = []
    for name, size in (("a", 20), ("b", 20), ("c", 20), ("b", 21), ("c", 21), ("a", 21), ("d", 100), ("a", 22)):
        number = engine.submit(Request(tuple(range(1, size + 1)), config, name))
        reused.append(finished(drain(engine), number).reused_tokens)
    assert reused == [0, 0, 0, 20, 20, 0, 0, 0]  # c sent a away, a then b; d alone is too much, after a had left
    assert engine.stats()["cached_tokens"] == 22


def test_an_edited_history_keeps_the_common_part(model: Model) -> None:
    engine = Engine(model)
    engine.submit(Request(tuple(range(1, 41)), GREEDY, "talk"))
    drain(engine)
    edited = (*range(1, 21), 99, 98)
    number = engine.submit(Request(edited, GREEDY, "talk"))
    events = drain(engine)
    assert finished(events, number).reused_tokens == 20
    assert tokens_of(events, number) == alone(model, edited, GREEDY)


def test_asking_the_same_again_computes_one_token(model: Model) -> None:
    engine = Engine(model)
    ids = tuple(range(1, 41))
    engine.submit(Request(ids, GREEDY, "talk"))
    first = drain(engine)
    number = engine.submit(Request(ids, GREEDY, "talk"))
    events = drain(engine)
    assert finished(events, number).reused_tokens == len(ids) - 1
    assert tokens_of(events, number) == tokens_of(first, 0)


def test_idle_conversations_give_way(model: Model) -> None:
    engine = Engine(model, slots=2)
    long = model.config.n_positions
    for name in ("a", "b", "c"):
        engine.submit(Request(tuple(range(1, 30)), GREEDY, name))
        drain(engine)
    number = engine.submit(Request(tuple([3] * (long - 2)), replace(GREEDY, max_new_tokens=50), None))
    done = finished(drain(engine), number)
    assert (done.reason, done.new_tokens) == ("length", 2)


def test_requests_that_share_a_small_cache_answer_as_each_alone(model: Model) -> None:
    """Whoever found the cache full was cut short with "length", however much its own context still held."""
    asked = [Request(tuple(range(1 + i, 30 + i)), replace(GREEDY, max_new_tokens=60 + i)) for i in range(4)]
    engine = Engine(model, slots=4, tokens=model.config.n_positions)
    numbers = [engine.submit(request) for request in asked]
    events = drain(engine)
    for number, request in zip(numbers, asked, strict=True):
        assert tokens_of(events, number) == alone(model, request.ids, request.config)
        assert finished(events, number).new_tokens == request.config.max_new_tokens
    assert engine.stats()["cached_tokens"] == 0


def test_an_engine_needs_slots_and_tokens(model: Model) -> None:
    for options in ({"slots": 0}, {"tokens": 0}):
        with pytest.raises(ConfigError, match="both must be at least 1"):
            Engine(model, **options)


def test_ends_at_the_context_size(model: Model) -> None:
    engine = Engine(model, tokens=64)
    assert engine.context_size == 64
    number = engine.submit(Request(tuple(range(1, 61)), replace(GREEDY, max_new_tokens=100)))
    done = finished(drain(engine), number)
    assert (done.reason, done.new_tokens) == ("length", 4)
    with pytest.raises(ConfigError, match="65 tokens; the context holds 64"):
        engine.submit(Request(tuple([1] * 65), GREEDY))


def test_wrong_prompts_are_refused(model: Model) -> None:
    engine = Engine(model)
    with pytest.raises(ConfigError, match="empty"):
        engine.submit(Request((), GREEDY))
    with pytest.raises(ConfigError, match=r"320 is outside the vocabulary of 320\. Is the tokenizer"):
        engine.submit(Request((1, 320), GREEDY))
    with pytest.raises(ConfigError, match="has no tokenizer, so stop strings cannot be found"):
        engine.submit(Request((1,), replace(GREEDY, stop_strings=("x",))))
    assert not engine.busy


def test_an_engine_that_nobody_needs_gives_its_memory_back(model: Model) -> None:
    """A cycle through the ops kept the cache, gigabytes for a large model, until Python looked for cycles."""
    engine = Engine(model)
    engine.submit(Request((1, 2), GREEDY))
    drain(engine)
    reference = weakref.ref(engine)
    gc.disable()
    try:
        del engine
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("ids", [[1.5, 2.0], [[1, 2]], "12", None, 3, np.zeros((2, 2), int)])
def test_generate_wants_one_row_of_whole_numbers(model: Model, ids: Any) -> None:
    """Fractions were cut off in silence; other things were a bare TypeError."""
    with pytest.raises(ShapeError, match="wanted is one sequence of whole numbers"):
        generate(model, ids, GREEDY)


def test_whole_numbers_of_any_kind_are_a_prompt(model: Model) -> None:
    wanted = alone(model, (1, 2), GREEDY)
    kinds: list[Any] = [np.array([1, 2], np.uint8), [np.int64(1), np.int32(2)], iter([1, 2])]
    for ids in kinds:
        assert [token.id for token in generate(model, ids, GREEDY)] == wanted


def test_stop_ids_end_and_are_given(model: Model) -> None:
    whole = alone(model, (1, 2, 3), GREEDY)
    stopped = alone(model, (1, 2, 3), replace(GREEDY, stop_ids=(whole[4],)))
    assert stopped == whole[: whole.index(whole[4]) + 1]


def test_ctrl_c_in_the_middle_of_a_pass_leaves_no_trace(model: Model) -> None:
    wanted = alone(model, (1, 2, 3), GREEDY)
    engine = Engine(model)
    number = engine.submit(Request((1, 2, 3), GREEDY, "talk"))
    events = engine.step()
    for layer in range(model.config.n_layer):
        inner = engine.runner.on_layer

        def strike(at: int, layer: int = layer) -> None:
            if at == layer:
                raise KeyboardInterrupt

        engine.runner.on_layer = strike
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        engine.runner.on_layer = inner
        events += engine.step()
    events += drain(engine)
    assert tokens_of(events, number) == wanted


def test_ctrl_c_at_any_line_of_a_step_leaves_no_trace(model: Model) -> None:
    """Books and events too: those made before an interrupt used to be lost, with the tokens in them."""
    asked = [Request(ids, replace(GREEDY, do_sample=True, seed=i), "talk") for i, ids in enumerate(prompts(model, 2))]
    asked += [Request(ids, replace(GREEDY, do_sample=True, seed=i)) for i, ids in enumerate(prompts(model, 3))]
    engine = Engine(model, slots=3, tokens=96)
    numbers = [engine.submit(request) for request in asked]
    events: list[Event] = []
    line, struck = 0, 0
    while engine.busy:
        line = (line + 3) % 150
        with _struck_at(line):
            try:
                events += engine.step()
            except KeyboardInterrupt:
                struck += 1
                events += engine.step()
    assert struck > 20
    for number, request in zip(numbers, asked, strict=True):
        assert tokens_of(events, number) == alone(model, request.ids, request.config)
        assert finished(events, number).new_tokens == len(tokens_of(events, number))
    engine.forget("talk")
    assert engine.stats()["cached_tokens"] == 0


def test_ctrl_c_at_each_line_of_the_last_step_ends_a_request_once(model: Model) -> None:
    """Struck between two lines, it went on past its last token, or was told twice that it had ended.

    What is lost is what the step was about to return.
    """
    want = alone(model, (5, 6), replace(GREEDY, max_new_tokens=1))
    told: list[bool] = []
    struck = True
    while struck:
        engine = Engine(model)
        number = engine.submit(Request((5, 6), replace(GREEDY, max_new_tokens=1)))
        events: list[Event] = []
        with _struck_at(len(told) + 1), suppress(KeyboardInterrupt):
            events += engine.step()
            struck = False
        events += drain(engine)
        told.append(bool(events))
        if events:
            assert tokens_of(events, number) == want
            assert finished(events, number).reason == "length"
    assert len(told) > 50
    assert told.count(False) == 1


@contextmanager
def _struck_at(line: int) -> Iterator[None]:
    """KeyboardInterrupt at the n-th line that the engine or its cache executes, once."""
    left = line

    def trace(frame: FrameType, _event: str, _value: object) -> Any:
        return count if frame.f_code.co_filename.endswith(("moss_jt/engine.py", "moss_jt/cache.py")) else None

    def count(_frame: FrameType, event: str, _value: object) -> Any:
        nonlocal left
        left -= event == "line"
        if left == 0:
            left = -1
            raise KeyboardInterrupt
        return count

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def test_cancel_from_another_thread_stops_within_a_layer(model: Model) -> None:
    engine = Engine(model)
    number = engine.submit(Request((1, 2, 3), replace(GREEDY, max_new_tokens=200), "talk"))
    engine.step()
    layers: list[int] = []
    inner = engine.runner.on_layer

    def watch(layer: int) -> None:
        layers.append(layer)
        thread = threading.Thread(target=engine.cancel, args=(number,))
        thread.start()
        thread.join()
        assert inner is not None
        inner(layer)

    engine.runner.on_layer = watch
    events = engine.step()
    assert layers == [0]
    done = finished(events, number)
    assert (done.reason, done.new_tokens) == ("cancelled", 1)
    engine.runner.on_layer = inner
    again = engine.submit(Request((1, 2, 3), GREEDY, "talk"))
    assert tokens_of(drain(engine), again) == alone(model, (1, 2, 3), GREEDY)


def test_cancel_before_it_began(model: Model) -> None:
    """Twice, which used to undo it."""
    engine = Engine(model)
    number = engine.submit(Request((1, 2), GREEDY))
    engine.cancel(number)
    engine.cancel(number)
    assert finished(drain(engine), number).reason == "cancelled"


def test_time_limit(model: Model) -> None:
    engine = Engine(model)
    number = engine.submit(Request((1, 2), replace(GREEDY, max_new_tokens=100_000, max_time=0.05)))
    assert finished(drain(engine), number).reason in ("time", "length")
    slow = engine.submit(Request((1, 2), replace(GREEDY, max_time=1e-9)))
    assert finished(drain(engine), slow).reason == "time"


def test_time_passes_while_waiting_for_a_slot(model: Model) -> None:
    engine = Engine(model)
    engine.submit(Request((1, 2), GREEDY))
    engine.step()
    late = engine.submit(Request((1, 2), replace(GREEDY, max_time=1e-9)))
    assert finished(engine.step(), late).reason == "time"


def test_rates_count_what_passes_computed(model: Model) -> None:
    """One token after a prompt was a decode rate of millions a second."""
    engine = Engine(model)
    engine.submit(Request((1, 2, 3), replace(GREEDY, max_new_tokens=1)))
    drain(engine)
    stats = engine.stats()
    assert stats["decode_tokens_per_s"] == stats["decode_s"] == 0
    assert stats["prefill_tokens_per_s"] == pytest.approx(3 / float(stats["prefill_s"]))
    engine.submit(Request((1, 2, 3), replace(GREEDY, max_new_tokens=5)))
    drain(engine)
    stats = engine.stats()
    assert stats["decode_tokens_per_s"] == pytest.approx(4 / float(stats["decode_s"]))


def test_two_requests_of_one_conversation_wait_for_each_other(model: Model) -> None:
    engine = Engine(model, slots=2, tokens=2 * model.config.n_positions)
    one = engine.submit(Request((1, 2, 3), GREEDY, "talk"))
    two = engine.submit(Request((1, 2, 3, 4), GREEDY, "talk"))
    events = drain(engine)
    assert tokens_of(events, one) == alone(model, (1, 2, 3), GREEDY)
    assert tokens_of(events, two) == alone(model, (1, 2, 3, 4), GREEDY)
    order = [event.request for event in events if isinstance(event, TokenEvent)]
    assert order == sorted(order)


def test_requests_without_a_conversation_begin_together(model: Model) -> None:
    """None was taken for the name of one conversation, and each pass let one of them in."""
    engine = Engine(model, slots=3, tokens=3 * model.config.n_positions)
    numbers = [engine.submit(Request((1, 2, 3 + i), GREEDY)) for i in range(3)]
    events = engine.step()
    assert [event.request for event in events if isinstance(event, TokenEvent)] == numbers
    drain(engine)


def test_a_tokenizer_of_another_model_is_told(golden: Path, model: Model, tmp_path: Path) -> None:
    """Every id was masked, and the weights were blamed."""
    shutil.copytree(model.path, tmp_path / "m")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(golden / "tokenizer" / "c-addedtoken-specials" / name, tmp_path / "m")
    other = load_model(tmp_path / "m")
    assert alone(other, (1, 2, 3), GREEDY) == alone(model, (1, 2, 3), GREEDY)
    ids = {token: number + 320 for token, number in json.loads((tmp_path / "m" / "vocab.json").read_text()).items()}
    (tmp_path / "m" / "vocab.json").write_text(json.dumps(ids))
    with pytest.raises(CheckpointError, match="has no token below 320, the size of the vocabulary"):
        Engine(load_model(tmp_path / "m"))


def test_values_too_large_for_half_are_told(model: Model) -> None:
    fast = load_model(model.path, compute="fast")
    fast.store.add("transformer.h.0.ln_1.bias", np.full(model.config.n_embd, 1e6))
    with pytest.raises(KernelError, match='compute="exact" holds larger keys and values'):
        alone(fast, (1, 2, 3), GREEDY)


def test_logits_that_are_not_numbers_are_an_error_of_one_request(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on when it is cancelled; their tokens of that pass used to be lost."""
    engine = Engine(model, slots=2)
    good, bad = (engine.submit(Request(ids, GREEDY)) for ids in ((1, 2), (3, 4)))
    events = engine.step()
    forward = engine.runner.forward

    def broken(batch: Batch) -> Floats:
        logits = forward(batch)
        logits[1] = np.nan
        return logits

    with monkeypatch.context() as patch, pytest.raises(KernelError, match=f"not numbers for request {bad};") as error:
        patch.setattr(engine.runner, "forward", broken)
        engine.step()
    assert error.value.request == bad
    engine.cancel(bad)
    events += drain(engine)
    assert finished(events, bad).reason == "cancelled"
    assert tokens_of(events, good) == alone(model, (1, 2), GREEDY)
