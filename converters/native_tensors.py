"""The bytes of one native tensor, made from another checkpoint piece by piece."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import sqrt
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from moss_jt.config import FloatType, Quantization
from moss_jt.converters.floats import FLOAT_BYTES, bits_of, cast_bits, check_finite, check_fits
from moss_jt.converters.journal import Note
from moss_jt.converters.names import gptq_names
from moss_jt.converters.output import PIECE_BYTES, Pieces
from moss_jt.converters.rounding import Errors, Quantizer, measure
from moss_jt.converters.source import Source
from moss_jt.errors import CheckpointError
from moss_jt.layout import TILE_ROWS, Layout, TileLayout
from moss_jt.packing import GptqMatrix, input_order, pack_end, pack_gptq_pieces, pack_tiles, plain_groups, tile_layout

_NUMBERS_AT_ONCE = 1 << 19  # quantised by one thread at a time: some 10 MiB of work, with all that is made of them
_MOST_THREADS = 16

Job = TypeVar("Job")
Result = TypeVar("Result")


class NativeMaker:
    """Makes native tensors one after another; the memory for the words of a matrix is used again.

    Args:
        quantizer: for matrices that are floating point in the source and int4 or int8 in the result.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        self._quantizer = quantizer
        self._memory: dict[str, npt.NDArray[np.uint8]] = {}

    def make(self, source: Source, name: str, layout: Layout, note: Note) -> Pieces:
        """Yield the bytes of a tensor in order, in new arrays of about 16 MiB; end it before the next one.

        Args:
            source: what it is made from.
            name: of the tensor.
            layout: that it will have.
            note: what else the manifest shall say of it is put here, at the end.

        Raises:
            CheckpointError: a number is not finite, does not fit the type asked for, or the source is
                not what was planned.
            DiskError: the disk fails.
        """
        if not isinstance(layout, TileLayout):
            yield from _padded(cast_floats(source, name, layout.dtype), layout.nbytes)
        elif name in source.layouts:
            yield from _copy(source, name)
        elif name in source.tensors:
            yield from self._quantize(source, name, layout, note)
        else:
            words = self._read_gptq(source, name)
            if tile_layout(layout.shape, layout.bits, layout.group_size, words.g_idx) != layout:
                raise CheckpointError(f"{source.path}: {gptq_names(name)['g_idx']} changed after the plan was made.")
            yield from pack_gptq_pieces(words, layout)

    def _read_gptq(self, source: Source, name: str) -> GptqMatrix:
        """Read the four tensors of a quantised matrix, into memory that the next call overwrites."""
        arrays: dict[str, Any] = {}
        for part, source_name in gptq_names(name).items():
            tensor = source.tensors[source_name]
            if part not in self._memory or self._memory[part].nbytes < tensor.nbytes:
                self._memory.pop(part, None)
                self._memory[part] = np.empty(tensor.nbytes, dtype=np.uint8)
            raw = self._memory[part][: tensor.nbytes]
            source.read_into(source_name, 0, raw)
            arrays[part] = raw.view("<f2" if part == "scales" else "<i4").reshape(tensor.shape)
        scales = source.tensors[gptq_names(name)["scales"]]
        check_finite(bits_of(arrays["scales"], "float16"), "float16", f"{scales.file}: {scales.name}", scales.shape)
        return GptqMatrix(**arrays)

    def _quantize(self, source: Source, name: str, layout: TileLayout, note: Note) -> Pieces:
        """Quantise a matrix of floats, some tiles at a time, with as many threads as there are cores."""
        n, k = layout.shape
        quantization = Quantization(layout.bits, layout.group_size)
        perm = input_order(layout, plain_groups(k, layout.group_size))
        step = max(1, _NUMBERS_AT_ONCE // (TILE_ROWS * k)) * TILE_ROWS

        def work(first: int) -> tuple[npt.NDArray[np.uint8], Errors]:
            rows = _read_rows(source, name, first, min(step, n - first))
            matrix = self._quantizer.quantize(name, rows, quantization)
            _check_scales(matrix.scales, f"{source.tensors[name].file}: {name}", layout, first)
            return pack_tiles(matrix, layout, perm), measure(rows, matrix, quantization)

        errors = Errors()
        for tiles, some in _in_order(work, range(0, n, step)):
            yield tiles
            errors += some
        yield pack_end(layout, perm)
        note["relative_error"] = _relative(errors.error, errors.signal)
        note["relative_error_plain"] = _relative(errors.plain, errors.signal)


def cast_floats(source: Source, name: str, dtype: FloatType) -> Pieces:
    """Yield the numbers of a tensor as `dtype`, as unsigned integers of its size."""
    tensor = source.tensors[name]
    size = FLOAT_BYTES[tensor.dtype]
    for start in range(0, tensor.nbytes, PIECE_BYTES):
        bits = _read_floats(source, name, start, min(PIECE_BYTES, tensor.nbytes - start))
        if tensor.dtype == dtype:
            yield bits
            continue
        cast = cast_bits(bits, tensor.dtype, dtype)
        check_fits(cast, dtype, f"{tensor.file}: {name}", tensor.shape, start // size)
        yield cast


def _read_floats(source: Source, name: str, start: int, nbytes: int) -> npt.NDArray[Any]:
    """Some numbers of a tensor as bits, all of them finite."""
    tensor = source.tensors[name]
    raw = np.empty(nbytes, dtype=np.uint8)
    source.read_into(name, start, raw)
    bits = bits_of(raw, tensor.dtype)
    check_finite(bits, tensor.dtype, f"{tensor.file}: {name}", tensor.shape, start // FLOAT_BYTES[tensor.dtype])
    return bits


def _read_rows(source: Source, name: str, first: int, count: int) -> npt.NDArray[np.float32]:
    """Some rows of a matrix as float32."""
    tensor = source.tensors[name]
    k = tensor.shape[1]
    size = FLOAT_BYTES[tensor.dtype] * k
    cast = cast_bits(_read_floats(source, name, first * size, count * size), tensor.dtype, "float32")
    check_fits(cast, "float32", f"{tensor.file}: {name}", tensor.shape, first * k)
    return cast.view("<f4").reshape(count, k)


def _check_scales(scales: npt.NDArray[np.float16], where: str, layout: TileLayout, first: int) -> None:
    """See that weights are not too large for the scale of their group."""
    wrong = np.argwhere(~np.isfinite(scales))
    if len(wrong):
        row, group = int(wrong[0, 0]) + first, int(wrong[0, 1])
        raise CheckpointError(
            f"{where}: the weights of row {row} from input {group * layout.group_size} on are too large for int{layout.bits}, "
            "whose scales are float16. Keep this model in floating point."
        )


def _copy(source: Source, name: str) -> Pieces:
    """The bytes of a blob as they are."""
    nbytes = source.tensors[name].nbytes
    for start in range(0, nbytes, PIECE_BYTES):
        raw = np.empty(min(PIECE_BYTES, nbytes - start), dtype=np.uint8)
        source.read_into(name, start, raw)
        yield raw


def _padded(pieces: Pieces, nbytes: int) -> Pieces:
    """The same pieces, then zeros up to so many bytes."""
    written = 0
    for piece in pieces:
        written += piece.nbytes
        yield piece
    if written < nbytes:
        yield np.zeros(nbytes - written, dtype=np.uint8)


def _in_order(work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
    """Do jobs in several threads and give their results in order, few of them under way at a time."""
    threads = min(len(os.sched_getaffinity(0)), _MOST_THREADS)
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads, "quantise")
    try:
        for job in jobs:
            waiting.append(pool.submit(work, job))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _relative(error: float, signal: float) -> float:
    """The root of the ratio of two sums of squares, to six digits."""
    return float(f"{sqrt(error / signal):.6g}") if signal > 0 else 0.0
