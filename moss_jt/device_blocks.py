"""Blocks of KV caches in device memory: one pool for all caches of a model, always without gaps.

A block lies in a unit of the pool, units are numbered from 0, and those in use are the first ones: where one is given
back, the last one moves into its place. So what lies behind them may be used for something else, up to the last byte.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moss_jt.device import Device, Place
from moss_jt.errors import DeviceMemoryError
from moss_jt.kv_layout import KVLayout

Units = npt.NDArray[np.int32]
_NONE = -1


@dataclass(frozen=True)
class _User:
    """Whose block a unit holds: entry `block` of a cache's table."""

    units: Units
    block: int


class BlockPool:
    """Units of device memory for blocks of keys and values.

    Args:
        device: whose memory it is.
        place: of unit 0; whoever takes units must know that there is room behind.
        layout: of a block.
        lock: held by whoever computes a pass: no unit moves meanwhile.
        room: gives the bytes from unit 0 on in which nothing else lies.

    Attributes:
        place, layout: as given.
    """

    def __init__(
        self, device: Device, place: Place, layout: KVLayout, lock: threading.RLock, room: Callable[[], int]
    ) -> None:
        self.place, self.layout = place, layout
        self._device, self._lock, self._room = device, lock, room
        self._users: list[_User] = []
        self._gone: list[Units] = []  # tables of caches that nobody has any more

    def of(self, units: int) -> Place:
        """Where a unit lies."""
        return self.place.after(units * self.layout.block_bytes)

    def blocks(self, layout: KVLayout, count: int) -> DeviceBlocks:
        """Room for the blocks of a new cache, for `moss_jt.cache.KVCache`."""
        assert layout == self.layout, "one pool holds one kind of block"
        return DeviceBlocks(self, count)

    @property
    def used_bytes(self) -> int:
        """Of the units in use."""
        return len(self._users) * self.layout.block_bytes

    def take(self, units: Units, block: int) -> None:
        """Give a block of a table the next unit.

        Raises:
            DeviceMemoryError: something else lies there.
        """
        with self._lock:
            self.sweep()
            if self.used_bytes + self.layout.block_bytes > self._room():
                raise DeviceMemoryError("one more block of a conversation would lie where weights are. Ask again.")
            self._users.append(_User(units, block))
            units[block] = len(self._users) - 1

    def give_back(self, units: Units, block: int) -> None:
        """Take a block's unit away, and close the gap."""
        with self._lock:
            free, last = int(units[block]), len(self._users) - 1
            user = self._users[last]
            if free != last:
                self._device.move(self.of(last), self.of(free), self.layout.block_bytes)
                self._users[free] = user
                user.units[user.block] = free
            units[block] = _NONE
            self._users.pop()

    def copy(self, units: Units, source: int, target: int) -> None:
        """Copy what one block of a table holds to another."""
        with self._lock:
            self._device.move(self.of(int(units[source])), self.of(int(units[target])), self.layout.block_bytes)

    def leave(self, units: Units) -> None:
        """A cache is gone. May be called anywhere, so nothing moves before `sweep`."""
        self._gone.append(units)

    def sweep(self) -> None:
        """Take back the units of caches that are gone; between passes."""
        with self._lock:
            while self._gone:
                units = self._gone[-1]
                for block in np.flatnonzero(units != _NONE):
                    self.give_back(units, int(block))
                self._gone.pop()


class DeviceBlocks:
    """The blocks of one cache; implements `moss_jt.cache.Blocks`.

    Attributes:
        units: (count,) int32, where each block lies in the pool; -1 where it has no memory.
    """

    def __init__(self, pool: BlockPool, count: int) -> None:
        self._pool = pool
        self.units: Units = np.full(count, _NONE, np.int32)
        weakref.finalize(self, pool.leave, self.units)

    def take(self, blocks: Iterable[int]) -> None:
        """Have memory for these blocks."""
        for block in blocks:
            if self.units[block] == _NONE:
                self._pool.take(self.units, block)

    def give_back(self, block: int) -> None:
        """Return the memory of one block."""
        if self.units[block] != _NONE:
            self._pool.give_back(self.units, block)

    def copy(self, source: int, target: int) -> None:
        """Copy what one block holds to another."""
        self._pool.copy(self.units, source, target)
