"""The bytes of one native tensor, made from a foreign checkpoint piece by piece."""

from __future__ import annotations

from typing import Any

import numpy as np

from moss_jt.config import FloatType
from moss_jt.converters.floats import FLOAT_BYTES, bits_of, cast_bits, check_finite, check_fits
from moss_jt.converters.names import gptq_names
from moss_jt.converters.output import PIECE_BYTES, Pieces
from moss_jt.converters.source import Source
from moss_jt.errors import CheckpointError
from moss_jt.layout import PlainLayout, RowsLayout, TileLayout
from moss_jt.packing import GptqMatrix, pack_gptq, tile_layout


def make_native(source: Source, name: str, layout: RowsLayout | TileLayout | PlainLayout) -> Pieces:
    """Yield the bytes of a tensor in order, in arrays of at most 16 MiB or of one whole quantised matrix.

    Raises:
        CheckpointError: a number is not finite, does not fit the type asked for, or the source is not
            what was planned.
        DiskError: the disk fails.
    """
    if isinstance(layout, TileLayout):
        yield _quantized(source, name, layout)
        return
    written = 0
    for piece in cast_floats(source, name, layout.dtype):
        written += piece.nbytes
        yield piece
    if written < layout.nbytes:
        yield np.zeros(layout.nbytes - written, dtype=np.uint8)


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


def read_gptq(source: Source, name: str) -> GptqMatrix:
    """Read the four tensors of a quantised matrix.

    Raises:
        CheckpointError: a scale is not finite.
    """
    parts = gptq_names(name)
    arrays: dict[str, Any] = {part: source.read(source_name) for part, source_name in parts.items()}
    scales = source.tensors[parts["scales"]]
    check_finite(bits_of(arrays["scales"], "float16"), "float16", f"{scales.file}: {scales.name}", scales.shape)
    return GptqMatrix(**arrays)


def _quantized(source: Source, name: str, layout: TileLayout) -> Any:
    words = read_gptq(source, name)
    if tile_layout(layout.shape, layout.bits, layout.group_size, words.g_idx) != layout:
        raise CheckpointError(
            f"{source.path}: {gptq_names(name)['g_idx']} has changed since the conversion was planned."
        )
    return pack_gptq(words, layout)
