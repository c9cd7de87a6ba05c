"""Random weights in memory, to measure a model that nobody has on disk.

    store = synthetic_store(config)          # 8.7 GB in seconds

Every matrix is cut from one pool of random bytes, each tile (or row) at another place of it, so the
memory is written once and at the speed of a copy. The numbers have the spread of a trained model's,
so activations stay finite; rows repeat here and there, so the answers mean even less than those of
`moss-convert synth`. Only the embedding is not kept: its rows are cut when they are asked for.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import sqrt

import numpy as np
import numpy.typing as npt

from moss_jt.checkpoint import expected_shapes, quantization_of
from moss_jt.config import MossConfig
from moss_jt.language import pick
from moss_jt.layout import Layout, PlainLayout, RowsLayout, TileLayout
from moss_jt.packing import tile_layout
from moss_jt.pages import Pages
from moss_jt.progress import Progress, Quiet
from moss_jt.startup.machine import logical_cores
from moss_jt.weights import Stored, WeightStore

Bytes = npt.NDArray[np.uint8]

EMBEDDING = "transformer.wte.weight"
_SPREAD = 1.0  # standard deviation of a linear layer's output when its inputs have 1
_POOL_BYTES = 8 << 20  # of codes; a pool of floats has as many numbers / 4
_SHARE = 64  # tiles or rows written at once
_SEED = 20230421


def layouts_of(config: MossConfig) -> dict[str, Layout]:
    """How each tensor of a model is stored: float16, and tiles where the config quantises."""
    return {name: _layout(config, name, shape) for name, shape in expected_shapes(config).items()}


def synthetic_store(config: MossConfig, *, threads: int | None = None, progress: Progress | None = None) -> WeightStore:
    """Make the weights of a model.

    Args:
        config: its shape and quantisation; the same one gives the same weights.
        threads: that write; None for all cores.
        progress: told about bytes.

    Raises:
        DeviceMemoryError: the system does not give the memory.
    """
    progress = Quiet() if progress is None else progress
    layouts = layouts_of(config)
    matrices = {n: v for n, v in layouts.items() if isinstance(v, RowsLayout | TileLayout) and n != EMBEDDING}
    pools = _Pools(config)
    total = sum(layout.nbytes for layout in matrices.values())
    whole = Pages(total, "random weights", "Ask for fewer layers.").array
    store, memory = SyntheticStore(config, pools, whole), _parts_of(whole, matrices)
    progress.begin(pick("making random weights", "生成随机权重"), total, "B")
    try:
        with ThreadPoolExecutor(threads or logical_cores()) as workers:
            for name in workers.map(lambda name: _fill(pools, name, matrices[name], memory[name]), matrices):
                store.put(Stored(name, memory[name], matrices[name]))
                progress.advance(matrices[name].nbytes)
    finally:
        progress.end()
    for name, layout in layouts.items():
        if isinstance(layout, PlainLayout):
            store.add(name, np.full(layout.shape, float(name.endswith(".weight")), np.float32))
    return store


class SyntheticStore(WeightStore):
    """Random weights; rows of the embedding are cut from the pool when asked for."""

    def __init__(self, config: MossConfig, pools: _Pools, whole: Bytes) -> None:
        super().__init__()
        self._pools = pools
        self._width = config.n_embd
        self._whole = whole

    @property
    def memory(self) -> list[Bytes]:
        """The memory that all matrices lie in."""
        return [self._whole]

    def rows(self, name: str, which: Sequence[int] | npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Rows of the embedding, (len(which), C) float32."""
        assert name == EMBEDDING, f"{name} has no rows to look up"
        normal = self._pools.normal
        starts = np.asarray(which, np.int64) * 7919 % (len(normal) - self._width)
        return normal[starts[:, None] + np.arange(self._width)].astype(np.float32)


class _Pools:
    """Random codes, zeros, and normal numbers; what matrices are cut from."""

    def __init__(self, config: MossConfig) -> None:
        random = np.random.Generator(np.random.SFC64(_SEED))
        longest = 64 * max(config.inner_dim, config.n_embd)  # bytes of the codes of a tile, at most
        self.layers = config.n_layer
        self.codes = np.frombuffer(random.bytes(_POOL_BYTES + longest), np.uint8)
        self.bits = self.codes & np.uint8(0x11)  # two nibbles of 0 or 1
        self.uniform = random.random(_POOL_BYTES // 8 + longest, np.float32)
        self.normal = random.standard_normal(_POOL_BYTES // 4 + longest, np.float32)


def _layout(config: MossConfig, name: str, shape: tuple[int, ...]) -> Layout:
    if len(shape) == 1:
        return PlainLayout(shape, "float16")
    quantization = quantization_of(config, name)
    if quantization is None:
        return RowsLayout((shape[0], shape[1]), "float16")
    return tile_layout((shape[0], shape[1]), quantization.bits, quantization.group_size)


def _parts_of(whole: Bytes, matrices: Mapping[str, RowsLayout | TileLayout]) -> dict[str, Bytes]:
    """The part of each matrix."""
    parts, start = {}, 0
    for name, layout in matrices.items():
        parts[name] = whole[start : start + layout.nbytes]
        start += layout.nbytes
    return parts


def _fill(pools: _Pools, name: str, layout: RowsLayout | TileLayout, data: Bytes) -> str:
    """Write a matrix; gives its name."""
    spread = _SPREAD / sqrt(layout.shape[1])
    if name.endswith((".out_proj.weight", ".fc_out.weight")):
        spread /= sqrt(2 * pools.layers)  # these add to the residual stream, layer after layer
    random = np.random.Generator(np.random.SFC64([_SEED, zlib.crc32(name.encode())]))
    if isinstance(layout, RowsLayout):
        n, k = layout.shape
        numbers = (pools.normal * np.float32(spread)).astype(np.float16)
        _cut(numbers, data[: n * layout.row_bytes].view(np.float16).reshape(n, k), random)
        return name
    tiles = data[: layout.perm_offset].reshape(layout.n_tiles, layout.tile_bytes)
    levels = 1 << layout.bits
    step = np.float32(spread / sqrt((levels * levels - 1) / 12))  # of codes drawn evenly
    scales = (step * (pools.uniform * np.float32(0.5) + np.float32(0.75))).astype(np.float16)
    zeros = pools.bits + np.uint8(0x66) if layout.bits == 4 else (pools.bits & np.uint8(1)) + np.uint8(126)
    at = 0
    for pool, size in ((pools.codes, layout.code_bytes), (scales, layout.scale_bytes), (zeros, layout.zero_bytes)):
        section = tiles[:, at : at + size]
        _cut(pool, section if pool.itemsize == 1 else section.view(pool.dtype), random)
        at += size
    return name


def _cut(pool: npt.NDArray[np.generic], rows: npt.NDArray[np.generic], random: np.random.Generator) -> None:
    """Fill rows, each with a stretch from another place of the pool."""
    width = rows.shape[1]
    room = len(pool) - width
    step = max(1, room // _SHARE) | 1
    for first in range(0, len(rows), _SHARE):
        part = rows[first : first + _SHARE]
        start = int(random.integers(0, max(1, room - step * (len(part) - 1))))
        item = pool.itemsize
        part[:] = np.lib.stride_tricks.as_strided(
            pool[start:], (len(part), width), (step * item, item), writeable=False
        )
