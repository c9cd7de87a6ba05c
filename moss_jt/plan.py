"""What lies where: how a budget of main memory is divided. Arithmetic only; nothing is taken here.

    memory = base + margin              the process itself, and what nobody foresaw
           + small                      norms, biases, permutations
           + buffers                    activations of a pass of `capacity` tokens
           + ring                       where streamed pieces of weights pass through, if any are streamed
           + KV                         grows in blocks of 32 tokens up to `context`
           + resident weights           the rest; they leave, evenly, as the KV cache grows

Every matrix keeps the same share of its rows in memory, rows [0, r); rows [r, N) are read in each
pass. So each stretch of a pass has the same part to read, and the disk is never idle while others
compute. At full context everything but the resident weights must still fit, else the budget is
refused. The embedding is not in the plan: its rows are read from the file, 12 KiB a token.

Two rules keep "more memory never streams more" true: the ring takes its full size before any weight
is resident, and a pass grows by a small part of the memory that comes on top.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from moss_jt.checkpoint import expected_shapes, quantization_of
from moss_jt.config import MossConfig
from moss_jt.errors import ConfigError
from moss_jt.kv_layout import BLOCK, KVLayout, KVType, whole_pages
from moss_jt.layout import ALIGNMENT, TILE_ROWS, Layout, PlainLayout, RowsLayout, TileLayout, round_up
from moss_jt.memory import MIB, PAGE, format_size
from moss_jt.packing import tile_layout

LEAST_CONTEXT = 256  # tokens below which a chat makes no sense; who asks for less gets it
PASS_TOKENS, MOST_PASS_TOKENS, PASS_STEP = 128, 512, 32  # new tokens of one pass
LOGIT_ROWS = 32  # rows of logits that are held at a time
PIECE = 4 * MIB  # streamed at a time; the disk's rate no longer grows with more
RING_SLOTS = 12  # some being read, some ready while the disk hesitates, one in use
MARGIN = 32 * MIB
_EMBEDDING, _HEAD = "transformer.wte.weight", "lm_head.weight"
_FINE = 1 << 40  # steps in which a share is searched
_PASS_SHARE, _STREAM_SHARE = 16, 32  # a longer pass gets at most these parts of spare memory and of streamed bytes


@dataclass(frozen=True)
class MatrixSize:
    """What the plan must know of a matrix.

    Attributes:
        rows: N, outputs.
        unit: rows that stay together when it is cut: 16 (tile16) or 1 (rows).
        unit_bytes: of them.
        extra_bytes: what is in memory whatever the plan (the permutation); counted in `Needs.small`.
        inputs: K.
        stored: as what, "int4", "int8" or a type of floating point.
    """

    name: str
    rows: int
    unit: int
    unit_bytes: int
    extra_bytes: int = 0
    inputs: int = 0
    stored: str = ""

    @property
    def units(self) -> int:
        """How many units it has; the last may hold fewer rows, but not fewer bytes."""
        return -(-self.rows // self.unit)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.units * self.unit_bytes

    def rows_of(self, units: int) -> int:
        """Rows in the first `units` units."""
        return min(units * self.unit, self.rows)

    def bytes_of(self, rows: int) -> int:
        """Bytes of the first `rows` rows, which are whole units or all."""
        return -(-rows // self.unit) * self.unit_bytes


@dataclass(frozen=True)
class Needs:
    """What else must have room, in bytes; `needs_of` makes it.

    Attributes:
        base: the process before any weight is there: measured at load, estimated before.
        buffers: of a pass of the smallest capacity.
        small: norms, biases and permutations.
        kv_token_bytes: of the KV cache, for each token.
        margin: for what nobody foresaw.
        pass_token_bytes: what one more token of capacity adds to the buffers.
        pass_tokens: the smallest capacity.
        positions: the longest context of the model.
        slots: sequences that share the cache; each but one may leave a block part empty.
    """

    base: int
    buffers: int
    small: int
    kv_token_bytes: int
    margin: int = MARGIN
    pass_token_bytes: int = 0
    pass_tokens: int = PASS_TOKENS
    positions: int = 2048
    slots: int = 1

    @property
    def fixed(self) -> int:
        """All but weights, ring and KV, with the smallest capacity."""
        return self.base + self.buffers + self.small + self.margin

    def kv_bytes(self, tokens: int) -> int:
        """Memory of the KV cache that holds `tokens` over all sequences, at worst."""
        return self._blocks(tokens) * self.block_bytes if tokens > 0 else 0

    @property
    def block_bytes(self) -> int:
        """Of a block of the cache, whole pages."""
        return whole_pages(BLOCK * self.kv_token_bytes)

    def _blocks(self, tokens: int) -> int:
        per_sequence = -(-self.positions // BLOCK)
        return min(-(-tokens // BLOCK) + self.slots - 1, per_sequence * self.slots)

    def tokens_in(self, nbytes: int) -> int:
        """The longest context whose cache has room in `nbytes`, at most `positions`."""
        if not self.block_bytes:
            return self.positions if nbytes >= 0 else 0  # the cache lies elsewhere
        blocks = max(0, nbytes) // self.block_bytes
        best = min(max(0, blocks - self.slots + 1) * BLOCK, self.positions)
        return self.positions if self.kv_bytes(self.positions) <= nbytes else best


@dataclass(frozen=True)
class Ring:
    """Memory that streamed pieces pass through: `slots` of `slot_bytes`, each for a piece of up to `piece_bytes`."""

    slots: int
    piece_bytes: int

    @property
    def slot_bytes(self) -> int:
        """Of one slot: a piece may start and end inside a page, and whole pages are read."""
        return round_up(self.piece_bytes, ALIGNMENT) + ALIGNMENT

    @property
    def nbytes(self) -> int:
        """Of all slots."""
        return self.slots * self.slot_bytes


@dataclass(frozen=True)
class Plan:
    """How a budget is divided.

    Attributes:
        memory: the budget.
        context: tokens that the KV cache may come to hold.
        ring_slots, slot_bytes, piece_bytes: of the ring; 0 where everything stays resident.
        capacity: tokens of a pass.
        resident: rows kept in memory, by matrix, with `kv_tokens_now` tokens cached.
        resident_bytes: of them, in whole pages.
        streamed_bytes: read in each pass.
        total_bytes: of all matrices in whole pages.
        room: for resident weights and KV together, in bytes; where the ring is below its full size, for KV alone.
        needs: what was planned for.
    """

    memory: int
    context: int
    ring_slots: int
    slot_bytes: int
    piece_bytes: int
    capacity: int
    resident: dict[str, int] = field(repr=False)
    resident_bytes: int
    streamed_bytes: int
    total_bytes: int
    room: int
    needs: Needs

    @property
    def ring_bytes(self) -> int:
        """Of the ring."""
        return self.ring_slots * self.slot_bytes

    @property
    def buffer_bytes(self) -> int:
        """Of the activations of a pass."""
        return self.needs.buffers + (self.capacity - self.needs.pass_tokens) * self.needs.pass_token_bytes

    def kv_bytes(self, tokens: int) -> int:
        """Memory of the KV cache when it holds `tokens`."""
        return self.needs.kv_bytes(tokens)

    def resident_budget(self, kv_tokens: int) -> int:
        """Bytes that resident weights may take while the cache holds `kv_tokens`; for `resident_rows`."""
        return self.budget_beside(self.kv_bytes(max(kv_tokens, 1)))

    def budget_beside(self, kv_bytes: int) -> int:
        """The same, where the cache takes `kv_bytes`."""
        return max(0, min(self.total_bytes, self.room - kv_bytes))


def layouts_of(config: MossConfig) -> dict[str, RowsLayout | TileLayout]:
    """How the matrices are stored, as far as the config tells; converters may have to permute them."""
    shapes = {name: shape for name, shape in expected_shapes(config).items() if len(shape) == 2}
    return {name: _layout_of(config, name, (shape[0], shape[1])) for name, shape in shapes.items()}


def _layout_of(config: MossConfig, name: str, shape: tuple[int, int]) -> RowsLayout | TileLayout:
    quantization = quantization_of(config, name)
    if quantization is not None:
        return tile_layout(shape, quantization.bits, quantization.group_size)
    return RowsLayout(shape, config.dtype or "float16")


def matrix_sizes(config: MossConfig, layouts: Mapping[str, Layout] | None = None) -> list[MatrixSize]:
    """The matrices of a pass in its order: four a layer, then lm_head; not the embedding.

    Args:
        layouts: by name, of a checkpoint; None takes what the config alone tells.
    """
    sizes = []
    for name, usual in layouts_of(config).items():
        if name == _EMBEDDING:
            continue
        layout = layouts[name] if layouts is not None else usual
        assert not isinstance(layout, PlainLayout), f"{name} is no matrix"
        sizes.append(_size_of(name, layout))
    return sizes


def _size_of(name: str, layout: RowsLayout | TileLayout) -> MatrixSize:
    n, k = layout.shape
    if isinstance(layout, RowsLayout):
        return MatrixSize(name, n, 1, layout.row_bytes, 0, k, layout.dtype)
    extra = layout.padded_in * 4 if layout.permuted else 0
    return MatrixSize(name, n, TILE_ROWS, layout.tile_bytes, extra, k, f"int{layout.bits}")


def buffer_widths(config: MossConfig) -> dict[str, int]:
    """The activations that a pass keeps, by name: float32 numbers a token."""
    width, inner = config.n_embd, config.inner_dim
    widths = dict.fromkeys(("x", "normed", "queries", "merged", "attn", "mlp"), width)
    return {**widths, "qkv": 3 * width, "inner": inner}


def pass_token_bytes(config: MossConfig) -> int:
    """What one token of capacity takes: activations, inputs put in order or rounded, its embedding row, its place."""
    layouts = [
        layout for name, layout in layouts_of(config).items() if name == _HEAD or name.startswith("transformer.h.0.")
    ]
    inputs = max(layout.padded_in if isinstance(layout, TileLayout) else layout.shape[1] for layout in layouts)
    return 4 * (sum(buffer_widths(config).values()) + inputs + config.n_embd) + 8


def buffer_bytes(config: MossConfig, capacity: int, slots: int = 1) -> int:
    """Memory of the buffers for passes of up to `capacity` tokens; the KV cache not included."""
    rows = max(LOGIT_ROWS, min(slots, capacity))  # go to the caller
    logits = 4 * (LOGIT_ROWS * (config.n_embd + config.vocab_size) + rows * config.vocab_size)
    tables = config.n_positions * config.rotary_dim * 4 + slots * -(-config.n_positions // BLOCK) * 4
    return capacity * pass_token_bytes(config) + logits + tables + 16 * ALIGNMENT


def small_bytes(config: MossConfig, sizes: Sequence[MatrixSize]) -> int:
    """Norms and biases in float32, and the permutations of the matrices."""
    floats = sum(shape[0] for shape in expected_shapes(config).values() if len(shape) == 1)
    return 4 * floats + sum(size.extra_bytes for size in sizes)


def needs_of(
    config: MossConfig,
    sizes: Sequence[MatrixSize],
    *,
    base: int,
    kv: KVType,
    slots: int = 1,
    margin: int = MARGIN,
) -> Needs:
    """What a model needs beside its matrices.

    Args:
        base: bytes of the process without weights, buffers and cache.
        kv: how keys and values are kept.
        slots: sequences that share the cache.
    """
    tokens = min(PASS_TOKENS, config.n_positions * slots)
    return Needs(
        base=base,
        buffers=buffer_bytes(config, tokens, slots),
        small=small_bytes(config, sizes),
        kv_token_bytes=KVLayout.of(config, kv).token_bytes,
        margin=margin,
        pass_token_bytes=pass_token_bytes(config),
        pass_tokens=tokens,
        positions=config.n_positions,
        slots=slots,
    )


def make_plan(
    sizes: Sequence[MatrixSize], needs: Needs, *, memory: int, context: int | None = None, kv_tokens_now: int = 0
) -> Plan:
    """Divide a budget.

    Args:
        memory: bytes for the whole process.
        context: tokens that the cache must be able to hold; None for as many as the model has, or fewer
            (LEAST_CONTEXT at least) where they do not fit.
        kv_tokens_now: tokens already cached; room for one block is kept free in any case.

    Raises:
        ConfigError: too little memory; says how much would do, and which context would fit.
    """
    if context is not None and context < 1:
        raise ConfigError(f"context is {context}; it must be at least 1 token.")
    weights = _Weights(sizes)
    chosen = _context(weights, needs, memory, context)
    now = needs.kv_bytes(max(kv_tokens_now, 1))
    if memory >= needs.fixed + weights.total + needs.kv_bytes(chosen):
        ring, room, reserve = None, memory - needs.fixed, 0
    else:
        ring = weights.best_ring(memory - needs.fixed - needs.kv_bytes(chosen))
        room = memory - needs.fixed - ring.nbytes
        streamed = weights.total - min(weights.total, max(0, room - now))
        reserve = _pass_reserve(needs, room - needs.kv_bytes(chosen), streamed)
        room = room - reserve if ring == weights.rings[-1] else needs.kv_bytes(chosen)
    rows = resident_rows(sizes, max(0, min(weights.total, room - now)))
    return Plan(
        memory=memory,
        context=chosen,
        ring_slots=ring.slots if ring else 0,
        slot_bytes=ring.slot_bytes if ring else 0,
        piece_bytes=ring.piece_bytes if ring else 0,
        capacity=needs.pass_tokens + _longer_pass(needs, reserve),
        resident=rows,
        resident_bytes=sum(round_up(size.bytes_of(rows[size.name]), PAGE) for size in sizes),
        streamed_bytes=sum(size.nbytes - size.bytes_of(rows[size.name]) for size in sizes),
        total_bytes=weights.total,
        room=room,
        needs=needs,
    )


def smallest_memory(sizes: Sequence[MatrixSize], needs: Needs, context: int | None = None) -> int:
    """The least budget that `make_plan` accepts."""
    tokens = min(LEAST_CONTEXT, needs.positions) if context is None else context
    return needs.fixed + needs.kv_bytes(tokens) + _Weights(sizes).least


def longest_context(sizes: Sequence[MatrixSize], needs: Needs, memory: int) -> int:
    """The longest context that `make_plan` accepts for a budget; 0 where none fits."""
    return needs.tokens_in(memory - needs.fixed - _Weights(sizes).least)


def resident_rows(sizes: Sequence[MatrixSize], nbytes: int) -> dict[str, int]:
    """How many rows of each matrix stay when all of them together may take `nbytes`, in whole pages each.

    Every matrix gets the same share of its units, rounded down; what is then left goes, a unit each, to
    the matrices whose share is nearest to the next unit. More bytes never mean fewer rows of any matrix.
    """

    def taken(share: int) -> int:
        return sum(_pages(size, size.units * share // _FINE) for size in sizes)

    low, high = 0, _FINE  # taken(low) fits, taken(high + 1) would not
    if taken(high) <= nbytes:
        return {size.name: size.rows for size in sizes}
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if taken(middle) <= nbytes else (low, middle)
    left = nbytes - taken(low)
    rows = {}
    full = False
    for size in sizes:
        units = size.units * low // _FINE
        if not full and size.units * high // _FINE > units:
            cost = _pages(size, units + 1) - _pages(size, units)
            full = cost > left
            if not full:
                units, left = units + 1, left - cost
        rows[size.name] = size.rows_of(units)
    return rows


def rest_of(sizes: Sequence[MatrixSize], base: Mapping[str, int]) -> list[MatrixSize]:
    """The matrices without the rows below `base`, whole units; those of which nothing is left are left out."""
    rest = [replace(size, rows=size.rows - base.get(size.name, 0)) for size in sizes]
    return [size for size in rest if size.rows]


def cut_rows(size: MatrixSize, first: int, piece_bytes: int) -> Iterator[tuple[int, int]]:
    """The pieces (first row, rows) in which rows [first, N) are streamed: as equal as whole units allow.

    Args:
        first: a whole number of units, or N.
        piece_bytes: of a piece at most; at least one unit.
    """
    start = -(-first // size.unit)
    left = size.units - start
    pieces = -(-left // max(1, piece_bytes // size.unit_bytes))
    for piece in range(pieces):
        here, there = start + left * piece // pieces, start + left * (piece + 1) // pieces
        yield here * size.unit, size.rows_of(there) - here * size.unit


class _Weights:
    """The matrices as a whole: what they take, and the rings that they can be streamed through."""

    def __init__(self, sizes: Sequence[MatrixSize]) -> None:
        self.total = sum(round_up(size.nbytes, PAGE) for size in sizes)
        self._unit = max((size.unit_bytes for size in sizes), default=0)

    @cached_property
    def rings(self) -> list[Ring]:
        """From the smallest that works to the one that keeps a disk busy, each larger than the one before.

        A small model is streamed through a small ring: pieces of about a 64th of it.
        """
        most = max(self._unit, min(PIECE, self.total // 64))
        pieces = [self._unit]
        while pieces[-1] * 2 < most:
            pieces.append(pieces[-1] * 2)
        rings = [Ring(4, self._unit), *(Ring(8, piece) for piece in pieces), Ring(8, most), Ring(RING_SLOTS, most)]
        return sorted({ring.nbytes: ring for ring in rings}.values(), key=lambda ring: ring.nbytes)

    @property
    def least(self) -> int:
        """The least memory in which the weights can be computed with at all."""
        return min(self.total, self.rings[0].nbytes)

    def best_ring(self, nbytes: int) -> Ring:
        """The largest ring within `nbytes`."""
        return max((ring for ring in self.rings if ring.nbytes <= nbytes), key=lambda ring: ring.nbytes)


def _pages(size: MatrixSize, units: int) -> int:
    return round_up(units * size.unit_bytes, PAGE)


def _context(weights: _Weights, needs: Needs, memory: int, asked: int | None) -> int:
    """The context to plan for.

    Raises:
        ConfigError: none fits, or not the one asked for.
    """
    least = needs.fixed + weights.least
    wanted = min(LEAST_CONTEXT, needs.positions) if asked is None else asked
    if least + needs.kv_bytes(wanted) > memory:
        raise ConfigError(_refusal(memory, wanted, least + needs.kv_bytes(wanted), needs.tokens_in(memory - least)))
    if asked is not None:
        return asked
    comfortable = needs.tokens_in(memory - needs.fixed - min(weights.total, weights.rings[-1].nbytes))
    return max(comfortable, wanted)


def _refusal(memory: int, wanted: int, smallest: int, longest: int) -> str:
    given = format_size(memory)
    if given == format_size(smallest):
        given = f"{memory} bytes"
    message = f"{given} of memory is too little for a context of {wanted} tokens: give at least {format_size(smallest)}"
    if longest:
        return f"{message}, or take a context of {longest} tokens, the longest that fits."
    return f"{message}; no context fits in {given}."


def _pass_reserve(needs: Needs, spare: int, streamed: int) -> int:
    """Bytes kept for passes beyond the smallest: each pass reads all streamed bytes again, so fewer passes read less.

    A smooth function of the memory: what grows in steps would take more at a step than the memory grew.
    """
    most = min(MOST_PASS_TOKENS, needs.positions * needs.slots) - needs.pass_tokens
    return max(0, min(spare // _PASS_SHARE, streamed // _STREAM_SHARE, most * needs.pass_token_bytes))


def _longer_pass(needs: Needs, reserve: int) -> int:
    """Tokens that a reserve adds to a pass, in whole steps."""
    return reserve // (PASS_STEP * needs.pass_token_bytes) * PASS_STEP if reserve else 0
