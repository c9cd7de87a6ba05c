"""KVLayout: where keys and values lie in a block of the KV cache, to the byte; arithmetic only.

    block   (layers, 2, H, BLOCK) rows, keys before values, then nothing up to whole pages
    row     what one head keeps of one token: D numbers, and for int8, behind its codes, ceil(D / STEP_CHANNELS)
            steps in bfloat16; neighbouring channels share a step, and a number is code * step

A block is the unit in which the cache takes memory and gives it back, and it holds all layers, so
that a sequence of any length costs whole blocks and nothing else. Where that adds little, the pages
are huge: the kernels then read half as fast again (docs/kernels.md).
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Literal

from moss_jt.config import MossConfig
from moss_jt.memory import HUGE_PAGE

KVType = Literal["float32", "float16", "int8"]

BLOCK = 32  # tokens
STEP_CHANNELS = 32  # int8: neighbours of a head that share a step
_HUGE_WASTE = 16  # one part in so many may be lost to whole huge pages
_ITEM_BYTES = {"float32": 4, "float16": 2, "int8": 1}
_STEP_BYTES = 2


@dataclass(frozen=True)
class KVLayout:
    """The shape of a block.

    Attributes:
        layers, heads, width: how many layers, H, D.
        kind: type of the stored numbers.
    """

    layers: int
    heads: int
    width: int
    kind: KVType

    @classmethod
    def of(cls, config: MossConfig, kind: KVType, layers: int | None = None) -> KVLayout:
        """The layout for a model, or for so many of its layers."""
        return cls(config.n_layer if layers is None else layers, config.n_head, config.head_dim, kind)

    @property
    def steps(self) -> int:
        """Steps of a row; 0 where the numbers need none."""
        return -(-self.width // STEP_CHANNELS) if self.kind == "int8" else 0

    @property
    def steps_at(self) -> int:
        """Byte of a row where its steps begin."""
        return self.width * _ITEM_BYTES[self.kind]

    @property
    def row_bytes(self) -> int:
        """Bytes of one head's key or value of a token."""
        return self.steps_at + self.steps * _STEP_BYTES

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer of a block, keys and values."""
        return 2 * self.heads * BLOCK * self.row_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes up over all layers; memory is counted in whole blocks, though."""
        return self.layers * self.layer_bytes // BLOCK

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, whole pages."""
        return whole_pages(self.layers * self.layer_bytes)

    @property
    def page_bytes(self) -> int:
        """Size of those pages."""
        return page_size(self.layers * self.layer_bytes)

    def bytes_for(self, tokens: int) -> int:
        """Bytes that one sequence of so many tokens takes from the system."""
        return -(-tokens // BLOCK) * self.block_bytes


def page_size(used: int) -> int:
    """The pages for blocks of which so many bytes are used."""
    return HUGE_PAGE if -used % HUGE_PAGE * _HUGE_WASTE <= used else mmap.PAGESIZE


def whole_pages(used: int) -> int:
    """What a block takes of which so many bytes are used."""
    page = page_size(used)
    return -(-used // page) * page
