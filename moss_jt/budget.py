"""Budget: one limit for the whole process, kept while caches grow and shrink.

The plan divides the memory once. What moves afterwards is the KV cache: before it takes a block,
weights leave to make room, evenly; when it has given blocks back, they return as they pass by.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Protocol

from moss_jt.cache import BLOCK, KVCache
from moss_jt.errors import ConfigError, DeviceMemoryError
from moss_jt.memory import format_size
from moss_jt.plan import MatrixSize, Plan, resident_rows


class Consumer(Protocol):
    """Something that takes memory beside the weights."""

    cache: KVCache
    buffer_bytes: int


class Holder(Protocol):
    """Whoever holds weights in the memory that is kept to: the store on the host, or what is on a device."""

    @property
    def lock(self) -> threading.RLock:
        """Held by whoever computes a pass, or changes what is held."""
        ...

    def hold(self, rows: Mapping[str, int]) -> None:
        """Hold this many rows of each matrix from now on."""
        ...


class Budget:
    """Keeps weights, caches and buffers within a plan.

    Args:
        plan: how the memory was divided.
        sizes: of the matrices.
        store: what holds the weights.
        floor: bytes of weights that never leave, as nobody else holds them.
    """

    def __init__(self, plan: Plan, sizes: Sequence[MatrixSize], store: Holder, *, floor: int = 0) -> None:
        self.plan = plan
        self._sizes = sizes
        self._store = store
        self._room = plan.room - floor
        self._held = plan.resident_budget(1)
        self._consumers: weakref.WeakSet[Consumer] = weakref.WeakSet()

    def most_tokens(self, slots: int) -> int:
        """Tokens that a cache of `slots` sequences could hold if every weight left for it that may."""
        return max(0, self._room // self.plan.needs.kv_bytes(1) - slots + 1) * BLOCK

    def check_tokens(self, tokens: int, slots: int) -> None:
        """Refuse a cache that could never be filled.

        Raises:
            ConfigError: says how many tokens would do.
        """
        most = self.most_tokens(slots)
        if tokens > most:
            raise ConfigError(
                f"a KV cache of {tokens} tokens in {slots} sequences does not fit in "
                f"{format_size(self.plan.memory)} beside the rest; take up to {most} tokens, or give more memory."
            )

    def join(self, consumer: Consumer) -> None:
        """Count a consumer for as long as it lives. One set of buffers is in the plan; others are counted here.

        Raises:
            DeviceMemoryError: its buffers do not fit.
        """
        self._consumers.add(consumer)
        try:
            self._settle(0)
        except DeviceMemoryError:
            self._consumers.discard(consumer)
            raise
        consumer.cache.on_take = self._settle
        consumer.cache.on_give = lambda _nbytes: self._settle(0)

    def _settle(self, more: int) -> None:
        """Hold as many weights as fit beside what is taken, and `more` bytes; a pass in another thread ends first.

        Raises:
            DeviceMemoryError: not even without weights; nothing changes then.
        """
        with self._store.lock:
            self._settle_alone(more)

    def _settle_alone(self, more: int) -> None:
        consumers = list(self._consumers)
        buffers = sum(consumer.buffer_bytes for consumer in consumers)
        extra = max(0, buffers - self.plan.buffer_bytes)
        taken = sum(consumer.cache.resident_bytes for consumer in consumers) + extra + more
        held = min(self.plan.budget_beside(taken), self.plan.resident_budget(1))
        # without a ring, weights cannot leave
        if taken > self._room or (held < self._held and not self.plan.ring_slots):
            raise DeviceMemoryError(
                f"{format_size(taken)} for conversations and their buffers do not fit in {format_size(self.plan.memory)} "
                f"beside the rest. Shorten a conversation, forget one, or give more memory."
            )
        if held != self._held:
            self._held = -1  # an interrupt may strike before all rows are told
            self._store.hold(resident_rows(self._sizes, held))
            self._held = held

    @property
    def is_tight(self) -> bool:
        """Whether weights have left to make room for caches."""
        return self._held < self.plan.resident_budget(1)  # after an interrupt, too
