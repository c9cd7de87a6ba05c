"""A tensor that lies somewhere in a file, perhaps as a view: its description, and reading it row by row."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt.checked_file import CheckedFile

_PIECE_BYTES = 16 << 20  # read at a time while a view is put in order

# our dtype -> how numpy holds it; what numpy does not know comes as unsigned integers of the same size
NUMPY_TYPES: dict[str, str] = {
    "bool": "?",
    "uint8": "u1",
    "int8": "i1",
    "float8_e4m3fn": "u1",
    "float8_e5m2": "u1",
    "uint16": "<u2",
    "int16": "<i2",
    "float16": "<f2",
    "bfloat16": "<u2",
    "uint32": "<u4",
    "int32": "<i4",
    "float32": "<f4",
    "uint64": "<u8",
    "int64": "<i8",
    "float64": "<f8",
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        dtype: a key of NUMPY_TYPES.
        stride: elements from one index to the next, for each dimension; none is negative.
        start: offset of the first element from the beginning of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return np.dtype(NUMPY_TYPES[self.dtype]).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in row-major order."""
        return prod(self.shape) * self.itemsize

    @property
    def contiguous(self) -> bool:
        """Whether the file holds it in row-major order."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != step:
                return not prod(self.shape)
            step *= size
        return True

    @property
    def overlapping(self) -> bool:
        """Whether two indices may mean the same element, apart from dimensions that repeat (stride 0)."""
        reach = 0
        moving = sorted(
            (stride, size) for stride, size in zip(self.stride, self.shape, strict=True) if size > 1 and stride
        )
        for stride, size in moving:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
        return False


def row_major_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor that lies in row-major order."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def read_tensor(file: CheckedFile, tensor: StoredTensor) -> npt.NDArray[Any]:
    """Read a tensor whole, in row-major order; needs 16 MiB beside the result, also for a view."""
    out = np.empty(tensor.shape, NUMPY_TYPES[tensor.dtype])
    if tensor.contiguous:
        file.read_into(tensor.start, flat_bytes(out))
    else:
        _gather(file, tensor.start, tensor.stride, out)
    return out


def flat_bytes(array: npt.NDArray[Any]) -> memoryview:
    """The memory of a contiguous array as bytes, to be filled."""
    return array.reshape(-1).view(np.uint8).data


def _gather(file: CheckedFile, start: int, stride: tuple[int, ...], out: npt.NDArray[Any]) -> None:
    """Fill `out` from a view, cutting it along its widest step until a piece is small enough to read."""
    steps = [step if size > 1 else 0 for size, step in zip(out.shape, stride, strict=True)]
    span = 1 + sum((size - 1) * step for size, step in zip(out.shape, steps, strict=True))
    if span * out.itemsize <= _PIECE_BYTES:
        piece = np.empty(span, out.dtype)
        file.read_into(start, flat_bytes(piece))
        out[...] = np.ndarray(out.shape, out.dtype, piece, strides=tuple(step * out.itemsize for step in steps))
        return
    axis = steps.index(max(steps))
    half = out.shape[axis] // 2
    before = (slice(None),) * axis
    lower, upper = (*before, slice(None, half)), (*before, slice(half, None))
    _gather(file, start, stride, out[lower])
    _gather(file, start + half * stride[axis] * out.itemsize, stride, out[upper])
