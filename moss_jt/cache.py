"""KVCache: keys and values of every sequence, in blocks handed out on demand.

A slot is one sequence. It owns a list of fixed-size blocks, each of all layers; the addresses of
all blocks are taken once, their memory when they are first needed. The cache counts tokens, it does
not compute: a pass first reserves room, writes through the kernels, and is committed when it has
run. What was written and not committed does not exist, so a pass may be broken off anywhere.

Memory goes up and down with the blocks: `on_take` is asked before blocks that the system has not
yet given are touched, and `trim` gives the free ones back. `resident_bytes` is the only ledger: who
keeps to a budget compares with it, and whatever an interrupt cuts short is right again at the next call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moss_jt.config import MossConfig
from moss_jt.errors import DeviceMemoryError
from moss_jt.kv_layout import BLOCK, STEP_CHANNELS, KVLayout, KVType
from moss_jt.memory import HUGE_PAGE
from moss_jt.pages import Pages

__all__ = ["BLOCK", "Blocks", "HostBlocks", "KVCache", "KVLayout", "KVType"]

Bytes = npt.NDArray[np.uint8]


class Blocks(Protocol):
    """Where the blocks of a cache lie."""

    def take(self, blocks: Iterable[int]) -> None:
        """Have memory for these, from before they are written; for those that have it nothing changes."""
        ...

    def give_back(self, block: int) -> None:
        """Return the memory of one; what was in it is lost."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Copy what one holds to another."""
        ...


class HostBlocks:
    """Blocks in main memory: the system gives it where they are touched.

    Attributes:
        memory: (blocks, block_bytes) uint8; kernels write it.

    Raises:
        DeviceMemoryError: the system does not give the addresses.
    """

    def __init__(self, layout: KVLayout, count: int) -> None:
        self._block_bytes = layout.block_bytes
        self._pages = Pages(
            count * layout.block_bytes,
            "the KV cache",
            "Ask for a shorter context.",
            huge=layout.page_bytes == HUGE_PAGE,  # else more would be resident than was touched
            reserve=False,
        )
        self.memory: Bytes = self._pages.array.reshape(count, layout.block_bytes)

    def take(self, blocks: Iterable[int]) -> None:
        """Nothing: whoever writes takes it."""

    def give_back(self, block: int) -> None:
        """Return the memory of one block to the system."""
        self._pages.give_back(block * self._block_bytes, self._block_bytes)

    def copy(self, source: int, target: int) -> None:
        """Copy what one block holds to another."""
        self.memory[target] = self.memory[source]


@dataclass
class _Slot:
    blocks: list[int] = field(default_factory=list)
    length: int = 0


class KVCache:
    """Room for `slots` sequences that share `tokens` positions.

    Args:
        blocks: where they are to lie, made for a layout and a number of them; else in main memory.

    Attributes:
        layout: where things lie in a block.
        table: block numbers of each slot, (slots, blocks a sequence) int32; kernels read it.
        on_take: called with a number of bytes before the cache becomes so much larger than `resident_bytes`.
            It makes room, or raises DeviceMemoryError, and then nothing changes.
        on_give: called with a number of bytes after the cache has become so much smaller.

    Raises:
        DeviceMemoryError: the system does not give the addresses.
    """

    def __init__(
        self,
        config: MossConfig,
        *,
        slots: int,
        tokens: int,
        kind: KVType = "float32",
        layers: range | None = None,
        blocks: Callable[[KVLayout, int], Blocks] = HostBlocks,
    ) -> None:
        per_slot = -(-config.n_positions // BLOCK)
        # a sequence may leave its last block part empty, so every slot but one may cost one block more
        self._count = min(-(-tokens // BLOCK) + slots - 1, per_slot * slots)
        self.layers = layers if layers is not None else range(config.n_layer)
        self.layout = KVLayout.of(config, kind, len(self.layers))
        self.limit = config.n_positions
        self.table: npt.NDArray[np.int32] = np.zeros((slots, per_slot), np.int32)
        self.blocks = blocks(self.layout, self._count)
        self.on_take: Callable[[int], None] | None = None
        self.on_give: Callable[[int], None] | None = None
        # Which blocks are free follows from who has them, so that an interrupt can nowhere lose one or give it twice.
        self._slots = [_Slot() for _ in range(slots)]
        self._touched: set[int] = set()  # blocks that the system has given, or may have

    @property
    def memory(self) -> Bytes:
        """All blocks, (blocks, block_bytes) uint8, where they lie in main memory."""
        assert isinstance(self.blocks, HostBlocks), "the blocks are not in main memory"
        return self.blocks.memory

    @property
    def kind(self) -> KVType:
        """Type of the stored numbers."""
        return self.layout.kind

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes up over all layers."""
        return self.layout.token_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of BLOCK tokens, in which memory is taken and given back."""
        return self.layout.block_bytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of the blocks that have been touched and not given back; the cache is never larger in memory."""
        return len(self._touched) * self.block_bytes

    def length(self, slot: int) -> int:
        """Tokens committed in a slot."""
        return self._slots[slot].length

    @property
    def used_tokens(self) -> int:
        """Tokens committed over all slots."""
        return sum(slot.length for slot in self._slots)

    def room(self, slot: int) -> int:
        """How many more tokens `reserve` would grant this slot now, if `on_take` agrees."""
        own = self._slots[slot]
        blocks = len(own.blocks) + self._count - sum(len(other.blocks) for other in self._slots)
        return min(blocks * BLOCK, self.limit) - own.length

    def missing_bytes(self, slot: int, count: int) -> int:
        """What `reserve` would ask `on_take` for."""
        return len(set(self._choose(self._slots[slot], count)) - self._touched) * self.block_bytes

    def reserve(self, slot: int, count: int) -> None:
        """Make sure that `count` tokens can be written after the committed ones.

        Raises:
            DeviceMemoryError: the cache is full, the sequence would pass n_positions, or `on_take`
                refuses. Nothing changes then.
        """
        own = self._slots[slot]
        if count > self.room(slot):
            raise DeviceMemoryError(
                f"the KV cache has no room for {count} more tokens after {own.length} (room for {self.room(slot)}). "
                "Shorten the prompt or free a conversation."
            )
        chosen = self._choose(own, count)
        new = set(chosen) - self._touched
        if new and self.on_take is not None:
            self.on_take(len(new) * self.block_bytes)
        self._touched.update(new)
        self.blocks.take(chosen)
        for block in chosen:
            self.table[slot, len(own.blocks)] = block
            own.blocks.append(block)

    def commit(self, slot: int, count: int) -> None:
        """`count` reserved tokens have been written in every layer."""
        own = self._slots[slot]
        assert own.length + count <= len(own.blocks) * BLOCK, "commit without reserve"
        own.length += count

    def truncate(self, slot: int, length: int) -> None:
        """Forget the tokens from `length` on. The blocks are free; their memory stays until `trim`."""
        own = self._slots[slot]
        assert 0 <= length <= own.length, f"cannot truncate {own.length} tokens to {length}"
        own.length = length
        del own.blocks[-(-length // BLOCK) :]

    def drop_block(self, slot: int) -> bool:
        """Free a slot's last block and forget the tokens in it; False where it has none."""
        own = self._slots[slot]
        if not own.blocks:
            return False
        own.length = min(own.length, (len(own.blocks) - 1) * BLOCK)
        own.blocks.pop()
        return True

    def release(self, slot: int) -> None:
        """Forget a slot's tokens and free its blocks."""
        self.truncate(slot, 0)

    def trim(self, keep: int = 0) -> int:
        """Give the memory of free blocks back to the system.

        Args:
            keep: bytes of free blocks that may stay, for what comes next.

        Returns:
            Bytes given back.
        """
        idle = sorted(self._touched.difference(*(slot.blocks for slot in self._slots)))
        given = 0
        for block in reversed(idle[keep // self.block_bytes :]):
            self.blocks.give_back(block)
            self._touched.discard(block)  # after it has gone: counted too long rather than too short
            given += self.block_bytes
        if given and self.on_give is not None:
            self.on_give(given)
        return given

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Give an empty slot the first `length` tokens of another one, None for all, in blocks of its own.

        Raises:
            DeviceMemoryError: not enough free blocks, or `on_take` refuses.
        """
        length = self._slots[source].length if length is None else length
        assert length <= self._slots[source].length, "more than there is to copy"
        assert self._slots[target].length == 0, "copy into a slot that is in use"
        self.reserve(target, length)
        pairs = zip(self._slots[source].blocks, self._slots[target].blocks, strict=False)
        for here, there in list(pairs)[: -(-length // BLOCK)]:
            self.blocks.copy(here, there)
        self.commit(target, length)

    def rows(self, layer: int) -> Bytes:
        """One layer of every block, (blocks, 2, H, BLOCK, row_bytes): a view that others than the kernels write, too."""
        layout, first = self.layout, self.layers.index(layer) * self.layout.layer_bytes
        shape = (len(self.memory), 2, layout.heads, BLOCK, layout.row_bytes)
        head, row = BLOCK * layout.row_bytes, layout.row_bytes
        return np.ndarray(shape, np.uint8, self.memory, first, (self.block_bytes, layout.heads * head, head, row, 1))

    def read(self, layer: int, slot: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Keys (rotary applied) and values of a slot, each (H, S, D) float32; a copy, for tests and export."""
        own = self._slots[slot]
        numbers = _widen(self.rows(layer)[own.blocks], self.layout)  # (blocks, 2, H, BLOCK, D)
        flat = numbers.transpose(1, 2, 0, 3, 4).reshape(2, self.layout.heads, -1, self.layout.width)
        return flat[0, :, : own.length], flat[1, :, : own.length]

    def _choose(self, own: _Slot, count: int) -> list[int]:
        """Free blocks for `count` more tokens, those first that are in memory already."""
        missing = -(-(own.length + count) // BLOCK) - len(own.blocks)
        if missing <= 0:
            return []
        taken = {block for slot in self._slots for block in slot.blocks}
        free = (block for block in range(self._count) if block not in taken)
        return sorted(free, key=lambda block: (block not in self._touched, block))[:missing]


def _widen(rows: Bytes, layout: KVLayout) -> npt.NDArray[np.float32]:
    """What rows hold: (..., row_bytes) to (..., D)."""
    raw = np.ascontiguousarray(rows[..., : layout.steps_at]).view(layout.kind)
    numbers = raw.astype(np.float32)
    if layout.steps:
        bits = np.ascontiguousarray(rows[..., layout.steps_at :]).view(np.uint16)
        steps = (bits.astype(np.uint32) << 16).view(np.float32)  # bfloat16
        numbers *= np.repeat(steps, STEP_CHANNELS, axis=-1)[..., : layout.width]
    return numbers
