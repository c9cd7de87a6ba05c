"""Engine: requests in, tokens out; many conversations share each pass over the weights.

    submit(Request) -> id      step() -> events      cancel(id)      stats()

Messages are plain data, so an engine can run in another process. One step is one pass of the
network: a token for every request that is answering, and pieces of the prompts that wait. The
cache of a named conversation is kept when its request ends, and the next request of that name
computes only what is new; a beginning that all may share is copied from whoever has it. A pass that
is broken off (Ctrl-C, cancel, an error) leaves no trace: nothing is committed before it has run, and
events that had no chance to be given are given by the next step.
When the cache is full, idle conversations give way first, then the youngest requests: these lose
the end of what they have cached and compute it again when there is room. No answer changes by it.
"""

from __future__ import annotations

import secrets
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moss_jt import sampling
from moss_jt.batch import Batch, common_prefix
from moss_jt.errors import ConfigError, DeviceMemoryError, KernelError
from moss_jt.messages import Event, FinishedEvent, PrefillEvent, Reason, Request, TokenEvent, TokenScores
from moss_jt.runner import Model
from moss_jt.shortlist import Shortlist, Wish, choose_from


@dataclass
class _Task:
    """A request that waits (no slot yet) or runs."""

    id: int
    request: Request
    tokens: list[int]  # prompt and answer
    seed: int
    submitted: float
    slot: int | None = None
    reused: int = 0
    first_token_at: float | None = None
    cancelled: bool = False

    @property
    def new_tokens(self) -> int:
        return len(self.tokens) - len(self.request.ids)


@dataclass(frozen=True)
class _Row:
    """A task's share of a pass: its next `count` tokens in `slot`; `complete` if the last known one is among them."""

    task: _Task
    slot: int
    count: int
    complete: bool


@dataclass(frozen=True)
class _Kept:
    """An idle conversation: its slot, and the tokens cached there."""

    slot: int
    tokens: list[int]


class _BrokenOff(Exception):
    """Every request of a pass was cancelled while it ran."""


class Engine:
    """Runs requests over one model.

    Args:
        model: what computes.
        slots: sequences that may be cached at once.
        tokens: positions of the cache over all of them; None for one full context.
        idle_tokens: cached tokens that conversations may keep while they are not answering, the last used first;
            None for all that there is room for.

    Attributes:
        model: what computes.
        runner: its cache and buffers, which are this engine's alone.
        context_size: tokens that one conversation may have, prompt and answer together.

    Raises:
        CheckpointError: no token of the folder's tokenizer is in the vocabulary.
        ConfigError: no slots, or no tokens.
    """

    def __init__(
        self, model: Model, *, slots: int = 1, tokens: int | None = None, idle_tokens: int | None = None
    ) -> None:
        if slots < 1 or (tokens is not None and tokens < 1):
            raise ConfigError(
                f"an engine of {slots} slots over {tokens} tokens can do nothing; both must be at least 1."
            )
        self.model = model
        self.runner = model.runner(slots=slots, tokens=tokens)
        self.runner.on_layer = _weakly(self)
        self.context_size = min(model.config.n_positions, tokens or model.max_tokens, self.runner.cache.room(0))
        # Which slots are free follows from these two, so that an interrupt can nowhere lose one.
        self._tasks: dict[int, _Task] = {}  # by id, which is by age
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._events: dict[tuple[int, str, int], Event] = {}  # not given yet; what is told again is told once
        self._slots = range(slots)
        self._idle_tokens = idle_tokens
        self._next = 0
        self._in_pass: list[_Task] = []
        self._allowed = model.known_ids()
        self.runner.allow(self._allowed)
        self._counts = {"prompt_tokens": 0, "reused_tokens": 0, "new_tokens": 0, "passes": 0}
        self._pass_tokens = {"prefill": 0, "decode": 0}
        self._pass_seconds = {"prefill": 0.0, "decode": 0.0}

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._tasks or self._events)

    def submit(self, request: Request) -> int:
        """Queue a request; its id names it in events.

        Raises:
            ConfigError: the prompt is empty, too long, or holds an id outside the vocabulary.
        """
        self._check(request)
        number = self._next
        self._next += 1
        seed = secrets.randbits(63) if request.config.seed is None else request.config.seed
        self._tasks[number] = _Task(number, request, list(request.ids), seed, time.perf_counter())
        return number

    def cancel(self, request: int) -> None:
        """End a request; it finishes with "cancelled" at the next step. May be called from another thread."""
        task = self._tasks.get(request)
        if task is not None:
            task.cancelled = True

    def forget(self, conversation: str) -> None:
        """Give back the cache of a conversation that is not answering."""
        kept = self._kept.pop(conversation, None)
        if kept is not None:
            self.runner.cache.release(kept.slot)

    def step(self) -> list[Event]:
        """One pass of the network over everything that waits or answers; an empty list when idle.

        Raises:
            KernelError: the model gave a request (`error.request`) logits that are not numbers.
                No request has changed; cancel that one, and the others go on.
            DeviceMemoryError: others within the same budget of memory leave none for the oldest request.
            CheckpointError, DiskError: weights cannot be read. After any of these the next step tries again.
        """
        self._end_some()
        self.runner.give_back()
        self._admit()
        rows = self._choose_rows()
        if rows:
            self._pass(rows)
            self._end_some()
        events, self._events = self._events, {}
        return list(events.values())

    def stats(self) -> dict[str, float | int | str]:
        """Counts and rates since the start, and what the cache holds.

        Seconds are those of passes; one that computes both prompts and answers counts as prefill.
        """
        tokens, seconds, cache = self._pass_tokens, self._pass_seconds, self.runner.cache
        return {
            **self._counts,
            **{f"{kind}_s": seconds[kind] for kind in seconds},
            **{f"{kind}_tokens_per_s": tokens[kind] / seconds[kind] if seconds[kind] else 0.0 for kind in seconds},
            "cached_tokens": cache.used_tokens,
            "cached_bytes": cache.used_tokens * cache.token_bytes,
            "context_size": self.context_size,
            **self._memory_stats(),
            "device": self.model.device,
            "compute": self.model.compute,
        }

    def _memory_stats(self) -> dict[str, float]:
        """Where the weights are, and what was read for them."""
        store, reading, budget, placed = (
            self.model.store,
            self.model.store.reading,
            self.model.budget,
            self.model.placed,
        )
        told: dict[str, float] = {
            "resident_bytes": store.resident_bytes,
            "streamed_bytes": store.streamed_bytes,
            "disk_bytes": reading.disk_bytes,
            "waited_for_disk_s": reading.waited_s,
        }
        if placed is None:
            return told | {"memory_limit": budget.plan.memory if budget is not None else 0}
        weights, host = placed.space.weights, placed.plans.host
        return told | {
            "memory_limit": host.memory if host is not None else 0,
            "vram_limit": placed.plans.device.memory,
            "device_bytes": weights.resident_bytes,
            "link_bytes_per_pass": weights.streamed_bytes,
            "link_bytes": weights.copied_bytes,
            "host_share": 0.0 if placed.space.share is None else placed.space.share.share,
        }

    def _check(self, request: Request) -> None:
        if not request.ids:
            raise ConfigError("the prompt is empty; give at least one token.")
        if len(request.ids) > self.context_size:
            raise ConfigError(
                f"the prompt has {len(request.ids)} tokens; the context holds {self.context_size}. Shorten it."
            )
        wrong = [i for i in request.ids if not 0 <= i < self.model.config.vocab_size]
        if wrong:
            raise ConfigError(
                f"token id {wrong[0]} is outside the vocabulary of {self.model.config.vocab_size}. "
                "Is the tokenizer that of another model?"
            )
        if request.top_logprobs is not None and not 0 <= request.top_logprobs <= self.model.config.vocab_size:
            raise ConfigError(f"top_logprobs is {request.top_logprobs}; it must be from 0 to the vocabulary's size.")
        if request.config.stop_strings and not self.model.has_tokenizer:
            raise ConfigError(f"{self.model.path} has no tokenizer, so stop strings cannot be found. Use stop_ids.")

    def after_layer(self) -> None:
        """Break a pass off if nobody waits for it any more."""
        if self._in_pass and all(task.cancelled for task in self._in_pass):
            raise _BrokenOff

    def _end_some(self) -> None:
        """Finish what has come to an end; that shows in the request itself, so nobody needs to remember it."""
        for task in list(self._tasks.values()):
            reason = self._reason_to_stop(task)
            if reason is not None:
                self._finish(task, reason)

    def _admit(self) -> None:
        """Give waiting requests a slot each, oldest first, as long as there are any."""
        free = self._free_slots()
        answering = {task.request.conversation for task in self._tasks.values() if task.slot is not None}
        for task in list(self._tasks.values()):
            name = task.request.conversation
            if task.slot is not None or (name is not None and name in answering):
                continue  # one answer at a time in a conversation
            kept = self._kept.pop(name, None) if name is not None else None
            if kept is not None:
                # the last token must be computed for its logits
                task.reused = common_prefix(kept.tokens, task.request.ids[:-1])
                self.runner.cache.truncate(kept.slot, task.reused)
                task.slot = kept.slot
            else:
                if not free:
                    free = self._give_way_to(task)
                if not free:
                    return
                slot = free.pop()
                task.reused = self._take_over(task, slot)
                task.slot = slot
            answering.add(name)
            self._tell_prefill(task, task.reused)

    def _free_slots(self) -> list[int]:
        """Slots that neither a request nor a kept conversation has, emptied."""
        owned = {task.slot for task in self._tasks.values()} | {kept.slot for kept in self._kept.values()}
        free = [slot for slot in self._slots if slot not in owned]
        for slot in free:
            self.runner.cache.release(slot)
        return free

    def _give_way_to(self, task: _Task) -> list[int]:
        """Free slots, where an idle conversation can be given up for them; not the one whose beginning is wanted, if there
        are others."""
        if not self._kept:
            return []
        source, shared = self._best_start(task)
        others = (name for name, kept in self._kept.items() if not shared or kept.slot != source)
        name = next(others, None)
        if name is not None:
            self.forget(name)
            return self._free_slots()
        only = self._kept.popitem()[1]
        self.runner.cache.truncate(only.slot, shared)
        return [only.slot]

    def _take_over(self, task: _Task, slot: int) -> int:
        """Put into a slot what others have cached of a request's beginning, as far as that may be shared; its tokens."""
        cache = self.runner.cache
        if cache.length(slot):  # it was another's, and the beginning is there
            return cache.length(slot)
        source, shared = self._best_start(task)
        if shared:
            try:
                cache.copy(source, slot, shared)
            except DeviceMemoryError:
                return 0  # computing it takes as much memory, but may make others give way
        return shared

    def _best_start(self, task: _Task) -> tuple[int, int]:
        """The slot that has most of what a request shares with others, and how many tokens that are."""
        wanted = task.request.ids[: min(task.request.shared, len(task.request.ids) - 1)]
        cached = {kept.slot: kept.tokens for kept in self._kept.values()}
        for other in self._tasks.values():
            if other.slot is not None:
                cached[other.slot] = other.tokens[: self.runner.cache.length(other.slot)]
        shared, slot = max(((common_prefix(cached[slot], wanted), slot) for slot in cached), default=(0, 0))
        return slot, shared

    def _forget_oldest(self) -> None:
        """Give up the idle conversation that was not used for the longest time."""
        self.forget(next(iter(self._kept)))

    def _choose_rows(self) -> list[_Row]:
        """The tokens of the next pass: answers first, then prompts, each oldest first, up to the capacity."""
        rows: list[_Row] = []
        left = self.runner.capacity
        pending = {task.id: self._pending(task) for task in self._tasks.values() if task.slot is not None}
        for number in sorted(pending, key=lambda number: (pending[number] > 1, number)):
            task, count = self._tasks[number], min(pending[number], left)
            if not count:
                break
            assert task.slot is not None
            if self._reserve(task, task.slot, count, rows):
                rows.append(_Row(task, task.slot, count, count == pending[number]))
                left -= count
            elif pending[number] > 1:
                break  # a younger prompt would only take what this one waits for
        return rows

    def _pending(self, task: _Task) -> int:
        """Tokens of a request that are not in the cache."""
        assert task.slot is not None
        cache, known = self.runner.cache, len(task.tokens)
        if cache.length(task.slot) == known:  # a step was interrupted after it had committed
            cache.truncate(task.slot, known - 1)
        return known - cache.length(task.slot)

    def _reserve(self, task: _Task, slot: int, count: int, rows: list[_Row]) -> bool:
        """Room for `count` tokens; who must give way is told at the head of this file. False: not now.

        The oldest request can always have it, so something always goes on.
        """
        cache = self.runner.cache
        in_pass = {row.task.id for row in rows}
        while True:
            refused = None
            try:
                if cache.room(slot) >= count:
                    cache.reserve(slot, count)
                    return True
            except DeviceMemoryError as error:  # others share the budget, and hold what is left of it
                refused = error
            if self._kept:
                self._forget_oldest()
                continue
            younger = [t.slot for t in self._tasks.values() if t.id > task.id and t.id not in in_pass]
            if not any(cache.drop_block(other) for other in reversed(younger) if other is not None):
                if refused is not None and not rows:
                    raise refused
                return False

    def _pass(self, rows: list[_Row]) -> None:
        """Run the network over the rows, and take up what it gives."""
        began = time.perf_counter()
        self._in_pass = [row.task for row in rows]
        batch = _flatten(rows, self.runner.cache.length)
        answers: Iterator[Shortlist | npt.NDArray[np.float32]]
        try:
            found = self._candidates(batch, rows)
            answers = iter(self.runner.forward(batch) if found is None else found)
        except _BrokenOff:
            return
        finally:
            self._in_pass = []
        # Nothing has changed until every token is picked: an error leaves all requests as they were.
        picked = [self._pick(row.task, next(answers)) if row.complete else None for row in rows]
        kind = "prefill" if any(row.count > 1 or not row.task.new_tokens for row in rows) else "decode"
        for row, choice in zip(rows, picked, strict=True):
            self.runner.cache.commit(row.slot, row.count)
            self._advance(row, choice)
        self._counts["passes"] += 1
        self._pass_tokens[kind] += sum(row.count for row in rows)
        self._pass_seconds[kind] += time.perf_counter() - began

    def _candidates(self, batch: Batch, rows: list[_Row]) -> list[Shortlist] | None:
        """What may come next, found where the logits are; None where all logits must be looked at."""
        ready = [row.task for row in rows if row.complete]
        if any(task.request.top_logprobs is not None for task in ready):
            return None
        return self.runner.shortlists(batch, [Wish(task.tokens, task.request.config) for task in ready])

    def _pick(self, task: _Task, answer: Shortlist | npt.NDArray[np.float32]) -> tuple[int, float, TokenScores | None]:
        if answer.is_broken if isinstance(answer, Shortlist) else not np.isfinite(answer).all():
            advice = f"`moss-convert verify {self.model.path}` checks the weights"
            if self.model.compute == "fast":
                advice += ', and compute="exact" holds larger keys and values than float16 can'
            raise KernelError(
                f"the model gave logits that are not numbers for request {task.id}; {advice}.", request=task.id
            )
        config, rng = task.request.config, sampling.step_rng(task.seed, task.new_tokens)
        if isinstance(answer, Shortlist):
            return (*choose_from(answer, config, rng), None)
        scores = sampling.process(answer, task.tokens, config, allowed=self._allowed)
        chosen, logprob = sampling.choose(scores, config, rng)
        count = task.request.top_logprobs
        if count is None:
            return chosen, logprob, None
        return chosen, logprob, TokenScores(*sampling.model_scores(answer, chosen, count, allowed=self._allowed))

    def _advance(self, row: _Row, picked: tuple[int, float, TokenScores | None] | None) -> None:
        """Take up the result of a pass for one request."""
        task = row.task
        if not task.new_tokens:
            self._tell_prefill(task, self.runner.cache.length(row.slot))
        if picked is None:
            return
        task.first_token_at = task.first_token_at or time.perf_counter()
        self._events[task.id, "token", len(task.tokens)] = TokenEvent(task.id, *picked)
        task.tokens.append(picked[0])

    def _tell_prefill(self, task: _Task, done: int) -> None:
        self._events[task.id, "prefill", done] = PrefillEvent(task.id, done, len(task.request.ids), task.reused)

    def _reason_to_stop(self, task: _Task) -> Reason | None:
        config, new = task.request.config, task.new_tokens
        if new and (task.tokens[-1] in config.stop_ids or self._has_stop_string(task)):
            return "stop"
        if new >= config.max_new_tokens or len(task.tokens) >= max(self.context_size, len(task.request.ids) + 1):
            return "length"
        if task.cancelled:
            return "cancelled"
        if config.max_time is not None and time.perf_counter() - task.submitted > config.max_time:
            return "time"
        return None

    def _has_stop_string(self, task: _Task) -> bool:
        """Whether the end of the answer holds one; what came before it was looked at before."""
        stops = task.request.config.stop_strings
        if not stops:
            return False
        reach = 4 * max(map(len, stops)) + 4  # tokens; a character is four bytes at most, and a token one at least
        text = self.model.tokenizer.decode(task.tokens[-min(task.new_tokens, reach) :])
        return any(stop in text for stop in stops)

    def _finish(self, task: _Task, reason: Reason) -> None:
        now = time.perf_counter()
        first, prompt = task.first_token_at or now, len(task.request.ids)
        times = (first - task.submitted, now - first)
        name, slot = task.request.conversation, task.slot
        if name is not None and slot is not None:
            self._kept[name] = _Kept(slot, task.tokens[: self.runner.cache.length(slot)])
        over = FinishedEvent(task.id, reason, prompt, task.reused, task.new_tokens, *times)
        self._events[task.id, "finished", 0] = over
        del self._tasks[task.id]
        if name is None and slot is not None:
            self.runner.cache.release(slot)
        counted = {"prompt_tokens": prompt, "reused_tokens": task.reused, "new_tokens": task.new_tokens}
        for key, count in counted.items():
            self._counts[key] += count
        while self._idle_tokens is not None and self._idle() > self._idle_tokens:
            self._forget_oldest()

    def _idle(self) -> int:
        """Cached tokens of conversations that are not answering."""
        return sum(len(kept.tokens) for kept in self._kept.values())


def _weakly(engine: Engine) -> Callable[[int], None]:
    """What the ops call after a layer. It does not hold the engine, whose gigabytes of cache thus go at once."""
    reference = weakref.ref(engine)

    def after_layer(_layer: int) -> None:
        alive = reference()
        if alive is not None:
            alive.after_layer()

    return after_layer


def _flatten(rows: list[_Row], length: Callable[[int], int]) -> Batch:
    """The batch of a pass."""
    ids: list[int] = []
    slots: list[int] = []
    positions: list[int] = []
    wanted: list[int] = []
    for row in rows:
        start = length(row.slot)
        ids += row.task.tokens[start : start + row.count]
        slots += [row.slot] * row.count
        positions += range(start, start + row.count)
        if row.complete:
            wanted.append(len(ids) - 1)
    return Batch(*(np.array(values, np.int32) for values in (ids, slots, positions, wanted)))
