"""Workspace: what all passes of a model on a device share: buffers, small tensors, weights, the pool of KV blocks.

One stretch of device memory holds everything. `workspace_bytes` says beforehand how much of it the buffers take, for
the plan; what is left then is the arena, whose start belongs to the caches and whose end to the weights.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moss_jt.cache import KVCache
from moss_jt.checkpoint import expected_shapes
from moss_jt.config import MossConfig
from moss_jt.device import Device, Place, Slab
from moss_jt.device_blocks import BlockPool
from moss_jt.device_weights import DeviceWeights
from moss_jt.host_share import HostShare
from moss_jt.kv_layout import BLOCK, KVLayout, KVType
from moss_jt.layout import RowsLayout, TileLayout
from moss_jt.ops import LOGIT_ROWS, ROUND_BLOCK, STRETCH, rotary_table
from moss_jt.plan import MARGIN, PASS_TOKENS, MatrixSize, Needs, Plan, buffer_widths, small_bytes
from moss_jt.sharing import ShareChoice, best_share
from moss_jt.shortlist import FOUND
from moss_jt.weights import WeightStore

TOLD = 4  # numbers of a token that a pass tells the device at once: slot, position, two of a tile
ROW_BLOCK = 64  # inputs, at most, that share a step where a matrix of 16-bit numbers takes them rounded; of the kernels
_ALIGNMENT = 256  # of what is taken from the slab
PINNED_BYTES = 512  # of main memory that the device can copy from, for each of its own: 8 bytes for a page of 4 KiB
_GRAPH_BYTES = 14 * (64 << 10)  # of a captured block: its launches, and what drivers are said to keep for each of them

Inputs = Literal["float32", "float16", "int8"]  # of products with matrices in int4 and int8; of others, float16 at most
Layouts = Mapping[str, RowsLayout | TileLayout]
Terms = Mapping[str, npt.NDArray[np.float32]]


def workspace_bytes(config: MossConfig, layouts: Layouts, capacity: int, rank: int = 0) -> dict[str, int]:
    """What the buffers take by name, for passes of up to `capacity` tokens; `rank` is that of an adapter."""
    stretches, per_sequence = -(-config.n_positions // STRETCH), -(-config.n_positions // BLOCK)
    blocks = max(blocks_of(layout) for layout in layouts.values())
    by_token = {
        **{name: 4 * width for name, width in buffer_widths(config).items()},
        "parts": 4 * config.n_head * stretches * (2 + config.head_dim),
        "tokens": 4 * TOLD,
        "middle": 4 * rank,
        "table": 4 * per_sequence,
        "codes": 2 * max(_padded_in(layout) for layout in layouts.values()),
        "steps": 4 * blocks,
        "sums": 4 * blocks,
    }
    return {
        **{name: capacity * nbytes for name, nbytes in by_token.items()},
        "picked": 4 * LOGIT_ROWS * config.n_embd,
        "logits": 4 * LOGIT_ROWS * config.vocab_size,
        "sincos": 4 * config.n_positions * config.rotary_dim,
        "allowed": config.vocab_size,
        "history": 4 * LOGIT_ROWS * config.n_positions,
        "penalties": 4 * LOGIT_ROWS,
        "wanted": 4 * LOGIT_ROWS,
        "found": LOGIT_ROWS * FOUND.itemsize,
    }


def device_needs(
    config: MossConfig,
    sizes: Sequence[MatrixSize],
    layouts: Layouts,
    *,
    base: int,
    kv: KVType,
    margin: int | None = None,
    terms: Terms | None = None,
) -> Needs:
    """What a model needs on a device beside its matrices, for `moss_jt.plan.make_plan`.

    Args:
        layouts: of the matrices in `sizes`.
        base: bytes that the process takes there in any case.
        margin: for what nobody foresaw; None for as much as on the host, and what pinning all weights there and
            the captured launches of each block take.
        terms: the low-rank terms of an adapter by name.
    """
    if margin is None:
        margin = MARGIN + sum(size.nbytes for size in sizes) // PINNED_BYTES + config.n_layer * _GRAPH_BYTES
    tokens = min(PASS_TOKENS, config.n_positions)
    one, two = (sum(workspace_bytes(config, layouts, count, rank_of(terms)).values()) for count in (1, 2))
    tensors = [shape for shape in expected_shapes(config).values() if len(shape) == 1]
    rounding = _ALIGNMENT * (len(tensors) + len(sizes) + len(workspace_bytes(config, layouts, 1)))
    return Needs(
        base=base,
        buffers=one + (tokens - 1) * (two - one),
        small=small_bytes(config, sizes) + rounding + sum(each.nbytes + _ALIGNMENT for each in (terms or {}).values()),
        kv_token_bytes=KVLayout.of(config, kv).token_bytes,
        margin=margin,
        pass_token_bytes=two - one,
        pass_tokens=tokens,
        positions=config.n_positions,
    )


def rank_of(terms: Terms | None) -> int:
    """The rank of low-rank terms, A (rank, K) and B (N, rank); 0 where there are none."""
    return max((min(values.shape) for values in (terms or {}).values()), default=0)


def blocks_of(layout: RowsLayout | TileLayout) -> int:
    """Runs in which the inputs of a matrix are rounded."""
    if isinstance(layout, RowsLayout):
        return -(-layout.shape[1] // ROW_BLOCK)
    per_group = -(-layout.padded_group // ROUND_BLOCK)
    whole, rest = divmod(layout.padded_in, layout.padded_group)
    return whole * per_group + -(-rest // ROUND_BLOCK)


def _padded_in(layout: RowsLayout | TileLayout) -> int:
    return layout.padded_in if isinstance(layout, TileLayout) else layout.shape[1]


class DeviceBuffer:
    """Rows of float32 in device memory, `width` to a row."""

    def __init__(self, place: Place, width: int) -> None:
        self.place, self.width = place, width


class Workspace:
    """Device memory of a model.

    Args:
        device: that computes.
        store: of the host: small tensors, rows of the embedding, the matrices.
        sizes: of the matrices, in the order of a pass.
        plan: how the device's memory is divided.
        kind: how keys and values are kept.
        terms: low-rank terms of an adapter by name, their factor in them.

    Attributes:
        buffers: the results of steps by name.
        parts: of attention; `slots`, `positions`, `tiles`, `table`, `sincos`: where they lie. The first three are one
            stretch: (capacity,), (capacity,) and (capacity, 2) int32.
        rounded: codes, steps and sums of rounded inputs.
        allowed, history, penalties, wanted, found: what choosing tokens needs, see kernels/shortlist.cu.
        pool: blocks of keys and values.
        weights: the matrices.
        share: what the host multiplies; None where it multiplies nothing.

    Raises:
        DeviceMemoryError: the device does not give what was planned.
    """

    def __init__(
        self,
        config: MossConfig,
        device: Device,
        store: WeightStore,
        *,
        sizes: Sequence[MatrixSize],
        plan: Plan,
        kind: KVType,
        terms: Terms | None = None,
    ) -> None:
        self.config, self.device, self.store, self.capacity = config, device, store, plan.capacity
        slab = Slab(device, plan.memory - plan.needs.base - plan.needs.margin, "the model")
        layouts = {size.name: store.layout(size.name) for size in sizes}
        wanted = workspace_bytes(config, layouts, self.capacity, rank_of(terms))
        places = {name: slab.take(nbytes, name) for name, nbytes in wanted.items()}
        widths = buffer_widths(config) | {"picked": config.n_embd, "logits": config.vocab_size}
        self.buffers = {name: DeviceBuffer(places[name], width) for name, width in widths.items()}
        self.parts, self.slots, self.table, self.sincos = (
            places[name] for name in ("parts", "tokens", "table", "sincos")
        )
        self.positions, self.tiles = (self.slots.after(4 * part * self.capacity) for part in (1, 2))
        self.rounded = (places["codes"], places["steps"], places["sums"])
        self.allowed, self.history, self.penalties, self.wanted, self.found = (
            places[name] for name in ("allowed", "history", "penalties", "wanted", "found")
        )
        device.write(self.sincos, rotary_table(config))
        self._small: dict[str, Place] = {}
        self._upload_small(slab, sizes)
        for name, values in (terms or {}).items():
            self._small[name] = self._upload(slab, np.ascontiguousarray(values, np.float32))
        self.middle = DeviceBuffer(places["middle"], rank_of(terms))
        self.weights = DeviceWeights(device, store, sizes, slab, slots=plan.ring_slots, slot_bytes=plan.slot_bytes)
        self.share: HostShare | None = None
        weights = self.weights
        self.pool = BlockPool(
            device, weights.arena, KVLayout.of(config, kind), store.lock, room=lambda: weights.free_bytes
        )

    def _upload_small(self, slab: Slab, sizes: Sequence[MatrixSize]) -> None:
        """Norms, biases, and the orders in which matrices hold their inputs, by the matrix."""
        for name, shape in expected_shapes(self.config).items():
            if len(shape) == 1:
                self._small[name] = self._upload(slab, self.store.small(name))
        for size in sizes:
            order = self.store.perm(size.name)
            if order is not None:
                self._small[size.name] = self._upload(slab, order)

    def _upload(self, slab: Slab, values: npt.NDArray[Any]) -> Place:
        place = slab.take(values.nbytes, "norms and biases")
        self.device.write(place, values)
        return place

    @property
    def lock(self) -> threading.RLock:
        """Held by whoever computes a pass, or changes what lies where."""
        return self.store.lock

    def hold(self, rows: Mapping[str, int]) -> None:
        """Hold this many rows of each matrix from now on, see `DeviceWeights.hold`; blocks that nobody has go first.

        Raises:
            DeviceMemoryError: they do not fit beside the blocks of conversations.
        """
        self.pool.sweep()
        self.weights.hold(rows, beside=self.pool.used_bytes)

    def inputs(self, *, rounding: bool) -> Inputs:
        """How fast compute rounds the inputs of products: to half, but to int8 where the host, which can do no other
        fast, has a share of them. So a row has the same arithmetic wherever it is computed."""
        if not rounding:
            return "float32"
        return "float16" if self.share is None else "int8"

    def leave_to_host(self, share: float) -> None:
        """Leave this share of what would be copied, 0 to 1, to the host's processor, for few tokens."""
        if self.share is not None:
            self.share.close()
        self.share = HostShare(self.device, self.store, self.weights.sizes, share) if share > 0 else None

    def choose_share(self) -> ShareChoice:
        """Leave to the host's processor what makes a token fastest, from rates measured now; only between passes.

        Raises:
            KernelError: the CPU kernels fail.
        """
        self.leave_to_host(1.0)
        assert self.share is not None, "just made"
        self.weights.begin_pass()
        products, logits = self.share.products(self.weights.held_rows), self.buffers["logits"]
        if not products:
            self.leave_to_host(0.0)
            return ShareChoice(0.0)
        rates = self.share.measure(products, logits.place, 4 * LOGIT_ROWS * logits.width)
        chosen = ShareChoice(best_share(rates, list(products.values())), rates)
        if chosen.share > 0:
            self.share.share = chosen.share
        else:
            self.leave_to_host(0.0)
        return chosen

    def small(self, name: str) -> Place:
        """Where a norm, a bias or a low-rank term lies, or the order of the inputs of a matrix."""
        return self._small[name]

    def cache(self, *, slots: int, tokens: int) -> KVCache:
        """A new cache, its blocks from the pool."""
        return KVCache(self.config, slots=slots, tokens=tokens, kind=self.pool.layout.kind, blocks=self.pool.blocks)
