"""KVCache: keys and values of every sequence, in blocks handed out on demand.

A slot is one sequence. It owns a list of fixed-size blocks, the same in every layer; the memory of
all blocks is taken once and written in place. The cache counts tokens, it does not compute: a pass
first reserves room, writes through the kernels, and is committed when it has run. What was written
and not committed does not exist, so a pass may be broken off anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from moss_jt.config import MossConfig
from moss_jt.errors import DeviceMemoryError

BLOCK = 32  # tokens
KVType = Literal["float32", "float16"]


@dataclass
class _Slot:
    blocks: list[int] = field(default_factory=list)
    length: int = 0


class KVCache:
    """Room for `slots` sequences that share `tokens` positions.

    Attributes:
        table: block numbers of each slot, (slots, blocks a sequence) int32; kernels read it.
        keys, values: by layer, (blocks, H, BLOCK, D) of `kind`.
    """

    def __init__(
        self, config: MossConfig, *, slots: int, tokens: int, kind: KVType = "float32", layers: range | None = None
    ) -> None:
        per_slot = -(-config.n_positions // BLOCK)
        # a sequence may leave its last block part empty, so every slot but one may cost one block more
        blocks = min(-(-tokens // BLOCK) + slots - 1, per_slot * slots)
        self.kind: KVType = kind
        self.layers = layers if layers is not None else range(config.n_layer)
        self.limit = config.n_positions
        self.table: npt.NDArray[np.int32] = np.zeros((slots, per_slot), np.int32)
        shape = (blocks, config.n_head, BLOCK, config.head_dim)
        # zeros are not touched: the system gives memory as blocks are first written
        self.keys = {layer: np.zeros(shape, kind) for layer in self.layers}
        self.values = {layer: np.zeros(shape, kind) for layer in self.layers}
        self._blocks = blocks
        # Which blocks are free follows from who has them, so that an interrupt can nowhere lose one or give it twice.
        self._slots = [_Slot() for _ in range(slots)]

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes up over all layers."""
        one = next(iter(self.keys.values()))
        return 2 * len(self.keys) * one.itemsize * one.shape[1] * one.shape[3]

    def length(self, slot: int) -> int:
        """Tokens committed in a slot."""
        return self._slots[slot].length

    @property
    def used_tokens(self) -> int:
        """Tokens committed over all slots."""
        return sum(slot.length for slot in self._slots)

    def room(self, slot: int) -> int:
        """How many more tokens `reserve` would grant this slot now."""
        own = self._slots[slot]
        blocks = len(own.blocks) + self._blocks - sum(len(other.blocks) for other in self._slots)
        return min(blocks * BLOCK, self.limit) - own.length

    def reserve(self, slot: int, count: int) -> None:
        """Make sure that `count` tokens can be written after the committed ones.

        Raises:
            DeviceMemoryError: the cache is full, or the sequence would pass n_positions. Nothing changes then.
        """
        own = self._slots[slot]
        if count > self.room(slot):
            raise DeviceMemoryError(
                f"the KV cache has no room for {count} more tokens after {own.length} (room for {self.room(slot)}). "
                "Shorten the prompt or free a conversation."
            )
        missing = -(-(own.length + count) // BLOCK) - len(own.blocks)
        if missing <= 0:
            return
        taken = {block for other in self._slots for block in other.blocks}
        for block in [block for block in range(self._blocks) if block not in taken][:missing]:
            self.table[slot, len(own.blocks)] = block
            own.blocks.append(block)

    def commit(self, slot: int, count: int) -> None:
        """`count` reserved tokens have been written in every layer."""
        own = self._slots[slot]
        assert own.length + count <= len(own.blocks) * BLOCK, "commit without reserve"
        own.length += count

    def truncate(self, slot: int, length: int) -> None:
        """Forget the tokens from `length` on."""
        own = self._slots[slot]
        assert 0 <= length <= own.length, f"cannot truncate {own.length} tokens to {length}"
        own.length = length
        del own.blocks[-(-length // BLOCK) :]

    def drop_block(self, slot: int) -> bool:
        """Give back a slot's last block and forget the tokens in it; False where it has none."""
        own = self._slots[slot]
        if not own.blocks:
            return False
        own.length = min(own.length, (len(own.blocks) - 1) * BLOCK)
        own.blocks.pop()
        return True

    def release(self, slot: int) -> None:
        """Forget a slot's tokens and give its blocks back."""
        self.truncate(slot, 0)

    def copy(self, source: int, target: int) -> None:
        """Give an empty slot the tokens of another one, in blocks of its own.

        Raises:
            DeviceMemoryError: not enough free blocks.
        """
        length = self._slots[source].length
        assert self._slots[target].length == 0, "copy into a slot that is in use"
        self.reserve(target, length)
        here, there = self._slots[source].blocks, self._slots[target].blocks
        used = -(-length // BLOCK)
        for layer in self.layers:
            for array in (self.keys[layer], self.values[layer]):
                array[there[:used]] = array[here[:used]]
        self.commit(target, length)

    def read(self, layer: int, slot: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Keys (rotary applied) and values of a slot, each (H, S, D) float32; a copy, for tests and export."""
        own = self._slots[slot]
        parts = []
        for array in (self.keys[layer], self.values[layer]):
            flat = array[own.blocks].transpose(1, 0, 2, 3)  # (H, blocks, BLOCK, D)
            parts.append(flat.reshape(flat.shape[0], -1, flat.shape[3])[:, : own.length].astype(np.float32))
        return parts[0], parts[1]
