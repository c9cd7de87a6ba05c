"""Engine: requests in, tokens out; many conversations share each pass over the weights.

    submit(Request) -> id      step() -> events      cancel(id)      stats()

Messages are plain data, so an engine can run in another process. One step is one pass of the
network: a token for every request that is answering, and pieces of the prompts that wait. The
cache of a named conversation is kept when its request ends, and the next request of that name
computes only what is new. A pass that is broken off (Ctrl-C, cancel) leaves no trace: nothing is
committed before it has run.
"""

from __future__ import annotations

import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from moss_jt import sampling
from moss_jt.batch import Batch
from moss_jt.config import GenerationConfig
from moss_jt.errors import ConfigError, DeviceMemoryError, KernelError
from moss_jt.runner import Model
from moss_jt.tokenizer import TextStream

Reason = Literal["stop", "length", "time", "cancelled"]


@dataclass(frozen=True)
class Request:
    """Tokens to continue.

    Attributes:
        ids: the whole prompt so far.
        config: how to choose and when to stop.
        conversation: keep the cache under this name afterwards; what the prompt has in common with
            what is cached there is not computed again.
    """

    ids: tuple[int, ...]
    config: GenerationConfig
    conversation: str | None = None


@dataclass(frozen=True)
class PrefillEvent:
    """`done` of the `total` prompt tokens are computed; `reused` of them came from the cache."""

    request: int
    done: int
    total: int
    reused: int


@dataclass(frozen=True)
class TokenEvent:
    """A new token, and the logarithm of the probability that it was drawn with."""

    request: int
    id: int
    logprob: float


@dataclass(frozen=True)
class FinishedEvent:
    """A request is over. Counts in tokens, times in seconds."""

    request: int
    reason: Reason
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    prefill_s: float
    decode_s: float


Event = PrefillEvent | TokenEvent | FinishedEvent


@dataclass
class _Running:
    id: int
    request: Request
    tokens: list[int]  # prompt and answer
    slot: int
    reused: int
    rng: np.random.Generator
    started: float
    stream: TextStream | None
    first_token_at: float | None = None
    text: str = ""
    cancelled: bool = False

    @property
    def new_tokens(self) -> int:
        return len(self.tokens) - len(self.request.ids)


@dataclass
class _Kept:
    slot: int
    tokens: list[int] = field(default_factory=list)


class _BrokenOff(Exception):
    """Every request of a pass was cancelled while it ran."""


class Engine:
    """Runs requests over one model.

    Args:
        model: what computes.
        slots: sequences that may be cached at once.
        tokens: positions of the cache over all of them; None for one full context.

    Attributes:
        context_size: tokens that one conversation may have, prompt and answer together.
    """

    def __init__(self, model: Model, *, slots: int = 1, tokens: int | None = None) -> None:
        self.model = model
        self._runner = model.runner(slots=slots, tokens=tokens)
        self._runner.ops.on_layer = _weakly(self)
        self.context_size = min(model.config.n_positions, tokens or model.max_tokens)
        self._waiting: OrderedDict[int, tuple[Request, float]] = OrderedDict()
        self._running: OrderedDict[int, _Running] = OrderedDict()
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._free = list(range(slots))[::-1]
        self._next = 0
        self._in_pass: list[_Running] = []
        self._allowed = _known_ids(model)
        self._counts = {"prompt_tokens": 0, "reused_tokens": 0, "new_tokens": 0, "passes": 0}
        self._seconds = {"prefill_s": 0.0, "decode_s": 0.0}

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._waiting or self._running)

    def submit(self, request: Request) -> int:
        """Queue a request; its id names it in events.

        Raises:
            ConfigError: the prompt is empty, too long, or holds an id outside the vocabulary.
        """
        if not request.ids:
            raise ConfigError("the prompt is empty; give at least one token.")
        if len(request.ids) > self.context_size:
            raise ConfigError(
                f"the prompt has {len(request.ids)} tokens; the context holds {self.context_size}. Shorten it."
            )
        wrong = [i for i in request.ids if not 0 <= i < self.model.config.vocab_size]
        if wrong:
            raise ConfigError(f"token id {wrong[0]} is outside the vocabulary of {self.model.config.vocab_size}.")
        if request.config.stop_strings and not self.model.has_tokenizer:
            raise ConfigError(f"{self.model.path} has no tokenizer, so stop strings cannot be found. Use stop_ids.")
        number = self._next
        self._next += 1
        self._waiting[number] = (request, time.perf_counter())
        return number

    def cancel(self, request: int) -> None:
        """End a request; it finishes with "cancelled" at the next step. May be called from another thread."""
        if request in self._running:
            self._running[request].cancelled = True
        elif request in self._waiting:
            waiting, started = self._waiting[request]
            self._waiting[request] = (waiting, -started)  # negative: cancelled before it began

    def forget(self, conversation: str) -> None:
        """Give back the cache of a conversation that is not answering."""
        kept = self._kept.pop(conversation, None)
        if kept is not None:
            self._release(kept.slot)

    def step(self) -> list[Event]:
        """One pass of the network over everything that waits or answers; an empty list when idle."""
        events = self._end_some()
        self._admit(events)
        batch, rows = self._assemble(events)
        if batch is None:
            return events
        self._in_pass = [running for running, _, _ in rows]
        try:
            logits = self._runner.forward(batch)
        except _BrokenOff:
            return events + self._end_some()
        finally:
            self._in_pass = []
        self._counts["passes"] += 1
        answers = iter(logits)
        for running, count, complete in rows:
            picked = self._pick(running, next(answers)) if complete else None
            self._runner.cache.commit(running.slot, count)
            events += self._advance(running, count, picked)
        return events

    def stats(self) -> dict[str, float | int | str]:
        """Counts and rates since the start, and what the cache holds."""
        prefill, decode = self._seconds["prefill_s"], self._seconds["decode_s"]
        computed = self._counts["prompt_tokens"] - self._counts["reused_tokens"]
        cache = self._runner.cache
        return {
            **self._counts,
            **self._seconds,
            "prefill_tokens_per_s": computed / prefill if prefill else 0.0,
            "decode_tokens_per_s": self._counts["new_tokens"] / decode if decode else 0.0,
            "cached_tokens": cache.used_tokens,
            "cached_bytes": cache.used_tokens * cache.token_bytes,
            "context_size": self.context_size,
            "device": self.model.device,
            "compute": self.model.compute,
        }

    def after_layer(self) -> None:
        """Break a pass off if nobody waits for it any more."""
        if self._in_pass and all(running.cancelled for running in self._in_pass):
            raise _BrokenOff

    def _end_some(self) -> list[Event]:
        """Finish what was cancelled or has run out of time."""
        events: list[Event] = []
        for running in list(self._running.values()):
            limit = running.request.config.max_time
            if running.cancelled:
                events.append(self._finish(running, "cancelled"))
            elif limit is not None and time.perf_counter() - running.started > limit:
                events.append(self._finish(running, "time"))
        for number, (request, started) in list(self._waiting.items()):
            if started < 0:
                del self._waiting[number]
                events.append(FinishedEvent(number, "cancelled", len(request.ids), 0, 0, 0.0, 0.0))
        return events

    def _admit(self, events: list[Event]) -> None:
        """Give waiting requests a slot each, oldest first, as long as there are any."""
        answering = {running.request.conversation for running in self._running.values()} - {None}
        for number, (request, started) in list(self._waiting.items()):
            if request.conversation in answering:
                continue  # one answer at a time in a conversation
            slot, reused = self._find_slot(request)
            if slot is None:
                return
            del self._waiting[number]
            answering.add(request.conversation)
            stream = self.model.tokenizer.stream() if request.config.stop_strings else None
            rng = np.random.default_rng(request.config.seed)
            self._running[number] = _Running(number, request, list(request.ids), slot, reused, rng, started, stream)
            events.append(PrefillEvent(number, reused, len(request.ids), reused))

    def _find_slot(self, request: Request) -> tuple[int | None, int]:
        """A slot, and how many tokens of the prompt it holds already."""
        kept = self._kept.pop(request.conversation, None) if request.conversation is not None else None
        if kept is not None:
            common = _common_prefix(kept.tokens, request.ids[:-1])  # the last one must be computed for its logits
            self._runner.cache.truncate(kept.slot, common)
            return kept.slot, common
        if not self._free and self._kept:
            self.forget(next(iter(self._kept)))  # the one not used for the longest time
        return (self._free.pop(), 0) if self._free else (None, 0)

    def _assemble(self, events: list[Event]) -> tuple[Batch | None, list[tuple[_Running, int, bool]]]:
        """Choose the tokens of the next pass: answers first, then prompts, up to the capacity.

        Each row is (request, its tokens in this pass, whether its last known token is among them).
        """
        cache = self._runner.cache
        rows: list[tuple[_Running, int, bool]] = []
        left = self._runner.capacity
        for running in sorted(self._running.values(), key=lambda r: r.new_tokens == 0):
            known = len(running.tokens)
            if cache.length(running.slot) == known:  # an interrupted step had committed it
                cache.truncate(running.slot, known - 1)
            pending = known - cache.length(running.slot)
            count = min(pending, left)
            if not count:
                break
            if not self._reserve(running, count):
                events.append(self._finish(running, "length"))
                continue
            rows.append((running, count, count == pending))
            left -= count
        return (_flatten(rows, cache.length) if rows else None), rows

    def _reserve(self, running: _Running, count: int) -> bool:
        """Room for `count` tokens; idle conversations give way."""
        while True:
            try:
                self._runner.cache.reserve(running.slot, count)
                return True
            except DeviceMemoryError:
                if not self._kept:
                    return False
                self.forget(next(iter(self._kept)))

    def _pick(self, running: _Running, logits: npt.NDArray[np.float32]) -> tuple[int, float]:
        if not np.isfinite(logits).all():
            raise KernelError(
                f"the model gave logits that are not numbers for request {running.id}; `moss-convert verify {self.model.path}` checks the weights."
            )
        config = running.request.config
        scores = sampling.process(logits, running.tokens, config, allowed=self._allowed)
        return sampling.choose(scores, config, running.rng)

    def _advance(self, running: _Running, count: int, picked: tuple[int, float] | None) -> list[Event]:
        """Take up the result of a pass for one request."""
        events: list[Event] = []
        if not running.new_tokens:
            done = self._runner.cache.length(running.slot)
            events.append(PrefillEvent(running.id, done, len(running.request.ids), running.reused))
        if picked is None:
            return events
        token, logprob = picked
        running.tokens.append(token)
        running.first_token_at = running.first_token_at or time.perf_counter()
        events.append(TokenEvent(running.id, token, logprob))
        reason = self._reason_to_stop(running, token)
        if reason is not None:
            events.append(self._finish(running, reason))
        return events

    def _reason_to_stop(self, running: _Running, token: int) -> Reason | None:
        config = running.request.config
        if token in config.stop_ids:
            return "stop"
        if running.stream is not None:
            running.text += running.stream.push(token)
            if any(stop in running.text for stop in config.stop_strings):
                return "stop"
        if running.new_tokens >= config.max_new_tokens or len(running.tokens) >= self.context_size:
            return "length"
        return None

    def _finish(self, running: _Running, reason: Reason) -> FinishedEvent:
        del self._running[running.id]
        now = time.perf_counter()
        first = running.first_token_at or now
        done = FinishedEvent(
            running.id,
            reason,
            len(running.request.ids),
            running.reused,
            running.new_tokens,
            first - running.started,
            now - first,
        )
        self._keep_or_release(running)
        for key in ("prompt_tokens", "reused_tokens", "new_tokens"):
            self._counts[key] += getattr(done, key)
        self._seconds["prefill_s"] += done.prefill_s
        self._seconds["decode_s"] += done.decode_s
        return done

    def _keep_or_release(self, running: _Running) -> None:
        name = running.request.conversation
        if name is None:
            self._release(running.slot)
            return
        self.forget(name)
        self._kept[name] = _Kept(running.slot, running.tokens[: self._runner.cache.length(running.slot)])

    def _release(self, slot: int) -> None:
        self._runner.cache.release(slot)
        self._free.append(slot)


def _weakly(engine: Engine) -> Callable[[int], None]:
    """What the ops call after a layer. It does not hold the engine, whose gigabytes of cache thus go at once."""
    reference = weakref.ref(engine)

    def after_layer(_layer: int) -> None:
        alive = reference()
        if alive is not None:
            alive.after_layer()

    return after_layer


def _common_prefix(a: list[int], b: tuple[int, ...]) -> int:
    """How many leading tokens two sequences share."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _flatten(rows: list[tuple[_Running, int, bool]], length: object) -> Batch:
    """The batch of a pass."""
    assert callable(length)
    ids: list[int] = []
    slots: list[int] = []
    positions: list[int] = []
    wanted: list[int] = []
    for running, count, complete in rows:
        start = length(running.slot)
        ids += running.tokens[start : start + count]
        slots += [running.slot] * count
        positions += range(start, start + count)
        if complete:
            wanted.append(len(ids) - 1)
    return Batch(*(np.array(values, np.int32) for values in (ids, slots, positions, wanted)))


def _known_ids(model: Model) -> npt.NDArray[np.bool_] | None:
    """Which ids may be generated: those that the tokenizer has; None for all."""
    if not model.has_tokenizer:
        return None
    return model.tokenizer.known_mask(model.config.vocab_size)
