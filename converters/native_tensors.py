"""The bytes of one native tensor, made from a foreign checkpoint piece by piece."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt.config import FloatType
from moss_jt.converters.floats import FLOAT_BYTES, bits_of, cast_bits, check_finite, check_fits
from moss_jt.converters.names import gptq_names
from moss_jt.converters.output import PIECE_BYTES, Pieces
from moss_jt.converters.source import Source
from moss_jt.errors import CheckpointError
from moss_jt.layout import Layout, TileLayout
from moss_jt.packing import GptqMatrix, pack_gptq_pieces, tile_layout


class NativeMaker:
    """Makes native tensors one after another; the memory for the words of a matrix is used again."""

    def __init__(self) -> None:
        self._memory: dict[str, npt.NDArray[np.uint8]] = {}

    def make(self, source: Source, name: str, layout: Layout) -> Pieces:
        """Yield the bytes of a tensor in order, in new arrays of about 16 MiB; end it before the next one.

        Raises:
            CheckpointError: a number is not finite, does not fit the type asked for, or the source is
                not what was planned.
            DiskError: the disk fails.
        """
        if isinstance(layout, TileLayout):
            words = self._read_gptq(source, name)
            if tile_layout(layout.shape, layout.bits, layout.group_size, words.g_idx) != layout:
                raise CheckpointError(f"{source.path}: {gptq_names(name)['g_idx']} changed after the plan was made.")
            yield from pack_gptq_pieces(words, layout)
            return
        written = 0
        for piece in cast_floats(source, name, layout.dtype):
            written += piece.nbytes
            yield piece
        if written < layout.nbytes:
            yield np.zeros(layout.nbytes - written, dtype=np.uint8)

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


def cast_floats(source: Source, name: str, dtype: FloatType) -> Pieces:
    """Yield the numbers of a tensor as `dtype`, as unsigned integers of its size."""
    tensor = source.tensors[name]
    size = FLOAT_BYTES[tensor.dtype]
    for start in range(0, tensor.nbytes, PIECE_BYTES):
        raw = np.empty(min(PIECE_BYTES, tensor.nbytes - start), dtype=np.uint8)
        source.read_into(name, start, raw)
        bits = bits_of(raw, tensor.dtype)
        check_finite(bits, tensor.dtype, f"{tensor.file}: {name}", tensor.shape, start // size)
        if tensor.dtype == dtype:
            yield bits
            continue
        cast = cast_bits(bits, tensor.dtype, dtype)
        check_fits(cast, dtype, f"{tensor.file}: {name}", tensor.shape, start // size)
        yield cast
