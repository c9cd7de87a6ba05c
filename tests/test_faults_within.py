"""Faults within a process that goes on: files that change, memory that is short, interrupts at any line.

The weights lie under a budget over which most of them are streamed. After each fault the next answer is right.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from faulty import PROMPT, places, small_model

from moss_jt import launch, tiers
from moss_jt.budget import Budget
from moss_jt.checkpoint import Checkpoint
from moss_jt.config import GenerationConfig
from moss_jt.engine import Engine
from moss_jt.errors import CheckpointError, DeviceMemoryError, MossError
from moss_jt.messages import Request, TokenEvent
from moss_jt.ops import InferenceOps
from moss_jt.plan import make_plan, matrix_sizes, needs_of, smallest_memory
from moss_jt.runner import Model
from moss_jt.weights import WeightStore

NEW = 8
SOURCES = {
    tiers.__file__,
    launch.__file__,
    *(sys.modules[c.__module__].__file__ for c in (Budget, WeightStore, InferenceOps)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("faults") / "model", tokenizer=False)


def budgeted(folder: Path, spare: int, context: int = 256) -> Model:
    """The model within the smallest memory that does, and `spare` bytes; the process itself not counted."""
    checkpoint = Checkpoint.open(folder)
    sizes = matrix_sizes(checkpoint.config, {name: entry.layout for name, entry in checkpoint.entries.items()})
    needs = needs_of(checkpoint.config, sizes, base=0, kv="float16")
    plan = make_plan(sizes, needs, memory=smallest_memory(sizes, needs, context) + spare, context=context)
    store = WeightStore(checkpoint, plan)
    budget = Budget(plan, sizes, store)
    return Model(checkpoint, store, compute="exact", device="cpu", max_tokens=plan.context, kv="float16", budget=budget)


@pytest.fixture
def own_model(model: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(model, tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
def streaming(jittor: object, own_model: Path) -> Iterator[Model]:
    loaded = budgeted(own_model, 6 << 20)
    assert loaded.store.streamed_bytes > loaded.store.resident_bytes > 0
    yield loaded
    loaded.store.close()


def request(count: int, conversation: str | None = None, prompt: tuple[int, ...] = PROMPT) -> Request:
    return Request(prompt, GenerationConfig(do_sample=False, max_new_tokens=count), conversation)


def answer(engine: Engine, count: int, prompt: tuple[int, ...] = PROMPT) -> list[int]:
    engine.submit(request(count, prompt=prompt))
    return rest_of(engine)


def rest_of(engine: Engine) -> list[int]:
    found = []
    while engine.busy:
        found += [event.id for event in engine.step() if isinstance(event, TokenEvent)]
    return found


def weight_file(folder: Path) -> Path:
    return folder / "model-00001-of-00001.safetensors"


def test_a_file_that_is_removed_or_replaced_stays_in_use(streaming: Model, own_model: Path, tmp_path: Path) -> None:
    """Its name leads elsewhere, or nowhere; what was loaded is still there, rows of the embedding included."""
    want = answer(Engine(streaming), NEW)
    other = tmp_path / "other"
    shutil.copy(weight_file(own_model), other)
    with other.open("r+b") as opened:
        at, end = places(own_model)["embedding"]
        opened.seek(at)
        opened.write(np.random.default_rng(1).integers(0, 60, end - at, dtype=np.uint8).tobytes())
    other.replace(weight_file(own_model))
    assert answer(Engine(streaming), NEW) == want
    weight_file(own_model).unlink()
    assert answer(Engine(streaming), NEW) == want


@pytest.mark.parametrize("place", ["embedding", "held", "streamed"])
def test_a_file_that_is_written_to_is_an_error(streaming: Model, own_model: Path, place: str) -> None:
    engine = Engine(streaming)
    want = answer(engine, NEW)
    engine.submit(request(NEW))
    told = [event.id for event in engine.step() if isinstance(event, TokenEvent)]
    at, end = places(own_model)[place]
    with weight_file(own_model).open("r+b") as opened:
        opened.seek(at)
        opened.write(bytes(end - at))
    with pytest.raises(CheckpointError, match=rf"{weight_file(own_model)} has changed: it was written to"):
        told += rest_of(engine)
    assert told == want[: len(told)]


def test_a_file_that_was_replaced_before_it_was_loaded(own_model: Path) -> None:
    """Between the reading of headers and of weights, Jittor may be compiled for minutes."""
    checkpoint = Checkpoint.open(own_model)
    copy = own_model / "copy"
    shutil.copy(weight_file(own_model), copy)
    copy.replace(weight_file(own_model))
    with pytest.raises(CheckpointError, match="was replaced while it was read"):
        WeightStore(checkpoint)


@pytest.mark.parametrize("size", [0, 4097, 20_000_000])
def test_a_file_that_becomes_shorter_is_an_error(streaming: Model, own_model: Path, size: int) -> None:
    engine = Engine(streaming)
    want = answer(engine, NEW)
    os.truncate(weight_file(own_model), size)
    engine.submit(request(NEW))
    told: list[int] = []
    with pytest.raises(MossError, match=rf"{weight_file(own_model)}.*(offset|byte) \d+"):
        told += rest_of(engine)
    assert told == want[: len(told)]


def test_memory_that_python_cannot_have_ends_a_step_and_no_more(
    streaming: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(streaming)
    want = answer(engine, NEW)
    rows = streaming.store.rows

    def fail(*_: object) -> None:
        raise MemoryError("Unable to allocate 1.00 GiB for an array")

    engine.submit(request(NEW))
    monkeypatch.setattr(streaming.store, "rows", fail)
    with pytest.raises(DeviceMemoryError, match=r"the memory for a pass \(Unable to allocate 1.00 GiB"):
        engine.step()
    monkeypatch.setattr(streaming.store, "rows", rows)
    assert rest_of(engine) == want


class _Hog:
    """Takes memory within a budget."""

    class _Cache:
        resident_bytes = 0
        on_take: Any = None
        on_give: Any = None

    def __init__(self, nbytes: int) -> None:
        self.cache: Any = self._Cache()
        self.buffer_bytes = nbytes


def fill_up(budget: Budget, blocks: int, *engines: Engine) -> _Hog:
    """Take all of a budget but some blocks of a cache."""
    caches = [engine.runner.cache for engine in engines]
    extra = sum(engine.runner.buffer_bytes for engine in engines[1:])
    taken = sum(cache.resident_bytes for cache in caches) + extra + blocks * caches[0].block_bytes
    hog = _Hog(budget.plan.room - taken)
    budget.join(hog)
    return hog


def test_conversations_that_fill_the_budget_give_way(own_model: Path) -> None:
    """Two engines share it: who finds none left is told what to do, and goes on as soon as there is some."""
    shared = budgeted(own_model, 16 << 20)
    assert shared.budget is not None
    long = tuple(np.random.default_rng(4).integers(0, 256, 200).tolist())
    want = answer(Engine(shared), NEW, long)
    gc.collect()
    first, second = Engine(shared), Engine(shared)
    first.submit(request(1, "kept", long))
    rest_of(first)
    hog = fill_up(shared.budget, 2, first, second)
    second.submit(request(NEW, prompt=long))
    for _ in range(2):
        with pytest.raises(DeviceMemoryError, match=r"do not fit in \S+ beside the rest.* forget one"):
            rest_of(second)
    first.forget("kept")
    first.runner.cache.trim()
    assert rest_of(second) == want
    with pytest.raises(DeviceMemoryError):
        answer(first, 1, long)
    del hog
    gc.collect()
    assert rest_of(first) == want[:1]
    shared.store.close()


def test_an_idle_conversation_gives_way_within_a_budget(own_model: Path) -> None:
    shared = budgeted(own_model, 16 << 20)
    assert shared.budget is not None
    long = tuple(np.random.default_rng(4).integers(0, 256, 200).tolist())
    want = answer(Engine(shared), NEW, long)
    gc.collect()
    engine = Engine(shared, slots=2, tokens=450)
    engine.submit(request(1, "kept", long[:150]))
    rest_of(engine)
    hog = fill_up(shared.budget, 3, engine)
    assert answer(engine, NEW, long) == want
    assert hog.cache.resident_bytes == 0 and not engine._kept
    shared.store.close()


# --- interrupts, in this process


def keys_and_values(engine: Engine) -> list[Any]:
    cache = engine.runner.cache
    return [cache.read(layer, 0) for layer in cache.layers]


def assert_goes_on(engine: Engine, told: list[int], want: list[int], kept: list[Any]) -> None:
    assert told + rest_of(engine) == want
    for (keys, values), (right_keys, right_values) in zip(keys_and_values(engine), kept, strict=True):
        np.testing.assert_array_equal(keys, right_keys)
        np.testing.assert_array_equal(values, right_values)


def undisturbed(model: Model, prompt: tuple[int, ...], count: int) -> tuple[list[int], list[Any]]:
    engine = Engine(model)
    engine.submit(request(count, "one", prompt))
    tokens = rest_of(engine)
    return tokens, keys_and_values(engine)


@pytest.mark.parametrize("prompt_tokens", [6, 240])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_ctrl_c_is_answered_within_a_layer(streaming: Model, prompt_tokens: int, layer: int) -> None:
    """A signal from outside, while a layer computes; the count is of layers that end after it."""
    prompt = tuple(np.random.default_rng(4).integers(0, 256, prompt_tokens).tolist())
    want, kept = undisturbed(streaming, prompt, 3)
    engine = Engine(streaming)
    engine.submit(request(3, "one", prompt))
    after_layer, at_work, sent, late = engine.runner.on_layer, threading.Event(), threading.Event(), []
    assert after_layer is not None

    def count(done: int) -> None:
        if sent.is_set():
            late.append(done)
        if done == layer:
            at_work.set()
        after_layer(done)

    def strike() -> None:
        at_work.wait(60)
        sent.set()
        os.kill(os.getpid(), signal.SIGINT)

    engine.runner.on_layer = count
    thread = threading.Thread(target=strike)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        rest_of(engine)
    thread.join()
    assert len(late) <= 1
    engine.runner.on_layer = after_layer
    assert_goes_on(engine, [], want, kept) if not engine._tasks[0].new_tokens else rest_of(engine)


@pytest.mark.parametrize("piece", [0, 1, 7, 30])
def test_ctrl_c_is_answered_within_a_piece(streaming: Model, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a piece is awaited: no other is asked for afterwards."""
    want, kept = undisturbed(streaming, PROMPT, 3)
    engine = Engine(streaming)
    engine.submit(request(3, "one"))
    tiers_of = streaming.store._tiers
    assert tiers_of is not None
    reader, acquired = tiers_of._reader, []
    acquire = reader.acquire

    def watched(index: int) -> int:
        acquired.append(index)
        if len(acquired) == piece + 1:
            signal.raise_signal(signal.SIGINT)
        return acquire(index)

    monkeypatch.setattr(reader, "acquire", watched)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert len(acquired) == piece + 1
    monkeypatch.setattr(reader, "acquire", acquire)
    assert_goes_on(engine, [], want, kept)


Line = tuple[str, str, int]  # file, function, number
TELLING = {"_cut_rest", "set_rows", "begin_pass", "run", "block"}  # the rest is for the thorough


class _Strike:
    """Interrupts where a line of the files that move weights and launch kernels runs for the `turn`-th time; counts lines without one."""

    def __init__(self, line: Line | None = None, turn: int = 0) -> None:
        self.line, self.turn = line, turn
        self.runs: Counter[Line] = Counter()

    def __enter__(self) -> _Strike:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        return self._step if frame.f_code.co_filename in SOURCES else None

    def _step(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            here = frame.f_code.co_filename, frame.f_code.co_name, frame.f_lineno
            self.runs[here] += 1
            if here == self.line and self.runs[here] == self.turn:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._step


@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_interrupt_at_any_line_does_no_harm(streaming: Model, thorough: bool) -> None:
    """Weights return while a short prompt is answered and leave for a long one: passes after it give the same tokens."""
    long = tuple(np.random.default_rng(4).integers(0, 256, 230).tolist())
    want, kept = undisturbed(streaming, long, 2)
    short = answer(Engine(streaming), 3)
    engine = Engine(streaming)

    def converse(strike: _Strike) -> bool:
        """Both answers, struck somewhere; whether it was."""
        engine.forget("one")
        struck = False
        for ask, right in ((request(3), short), (request(2, "one", long), want)):
            engine.submit(ask)
            told: list[int] = []
            with suppress(KeyboardInterrupt), strike:
                while engine.busy:
                    told += [event.id for event in engine.step() if isinstance(event, TokenEvent)]
            struck = struck or engine.busy
            told += rest_of(engine)
            assert told == right, strike.line
        assert_goes_on(engine, want, want, kept)
        return struck

    counting = _Strike()
    assert not converse(counting)
    struck = 0
    for line, runs in sorted(counting.runs.items()):
        turns = {1, 2, runs // 2, runs} if thorough else {min(2, runs)} if line[1] in TELLING else set()
        for turn in sorted(turns & set(range(1, runs + 1))):
            struck += converse(_Strike(line, turn))
    assert struck > 15


def test_an_interrupt_of_a_launch_does_no_harm(jittor: object, model: Path) -> None:
    """Everything is held, so a launch is a whole layer: done twice, it would add twice."""
    checkpoint = Checkpoint.open(model)
    held = Model(checkpoint, WeightStore(checkpoint), compute="fast", device="cpu", max_tokens=64)
    want, kept = undisturbed(held, PROMPT, 3)
    counting = _Strike()
    engine = Engine(held)
    engine.submit(request(3, "one"))
    with counting:
        rest_of(engine)
    struck = 0
    for line, runs in sorted(counting.runs.items()):
        for turn in range(1, min(runs, 9) + 1) if line[1] == "run" else ():
            engine = Engine(held)
            engine.submit(request(3, "one"))
            told: list[int] = []
            with suppress(KeyboardInterrupt), _Strike(line, turn):
                while engine.busy:
                    told += [event.id for event in engine.step() if isinstance(event, TokenEvent)]
            struck += engine.busy
            assert_goes_on(engine, told, want, kept)
    assert struck > 15


def test_weights_do_not_move_within_the_pass_of_another_thread(own_model: Path) -> None:
    """Two engines share a budget: what one takes for its cache leaves the other's passes as they are."""
    shared = budgeted(own_model, 12 << 20)
    long = tuple(np.random.default_rng(4).integers(0, 256, 200).tolist())
    want = answer(Engine(shared), 40), answer(Engine(shared), 2, long)
    gc.collect()
    first, second = Engine(shared), Engine(shared)
    got: list[list[int]] = []

    def repeat() -> None:
        for _ in range(4):
            got.append(answer(first, 40))

    thread = threading.Thread(target=repeat)
    thread.start()
    turns = 0
    while thread.is_alive() or not turns:
        assert answer(second, 2, long) == want[1]
        second.runner.cache.trim()
        turns += 1
    thread.join()
    assert got == [want[0]] * 4
    shared.store.close()
