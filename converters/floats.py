"""Floating-point numbers as files hold them: change their type, and refuse what is not finite.

Everything works on the bits, as unsigned integers, because numpy has no bfloat16 and is slow at
asking float16 whether it is finite.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt.config import FloatType
from moss_jt.errors import CheckpointError

FLOAT_BYTES: dict[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_BITS: dict[str, str] = {"float16": "<u2", "bfloat16": "<u2", "float32": "<u4", "float64": "<u8"}
_EXPONENT: dict[str, int] = {
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float32": 0x7F800000,
    "float64": 0x7FF0000000000000,
}

_CHECKED_AT_ONCE = 1 << 17  # numbers: they stay in the cache between two passes

Bits = npt.NDArray[Any]


def bits_of(raw: npt.NDArray[Any], dtype: str) -> Bits:
    """Little-endian floats as unsigned integers of the same size: a flat view."""
    return raw.reshape(-1).view(np.uint8).view(_BITS[dtype])


def first_not_finite(bits: Bits, dtype: str) -> int | None:
    """The index of the first NaN or infinity, None if all numbers are finite."""
    mask = bits.dtype.type(_EXPONENT[dtype])
    exponents = np.empty(min(_CHECKED_AT_ONCE, bits.size), dtype=bits.dtype)
    for start in range(0, bits.size, _CHECKED_AT_ONCE):
        some = bits[start : start + _CHECKED_AT_ONCE]
        found = np.bitwise_and(some, mask, out=exponents[: some.size])
        if found.max() == mask:
            return start + int(np.argmax(found == mask))
    return None


def cast_bits(bits: Bits, source: str, target: FloatType) -> Bits:
    """Change the type of floats, rounding to nearest even; the same array where the types agree.

    A finite number too large for the target becomes infinite.
    """
    if source == target:
        return bits
    if source == "bfloat16":
        wide = (bits.astype("<u4") << np.uint32(16)).view("<f4")
    else:
        wide = bits.view({"float16": "<f2", "float32": "<f4", "float64": "<f8"}[source])
    if target == "bfloat16":
        return _to_bfloat16(wide)
    with np.errstate(over="ignore"):
        narrow: Bits = wide.astype("<f2" if target == "float16" else "<f4").view(_BITS[target])
    return narrow


def _to_bfloat16(numbers: npt.NDArray[Any]) -> Bits:
    """The upper half of float32, rounded to nearest even."""
    with np.errstate(over="ignore"):
        wide = numbers.astype("<f4").view("<u4")
    nearest: Bits = wide + (np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1)))
    return (nearest >> np.uint32(16)).astype("<u2")


def check_finite(bits: Bits, dtype: str, name: str, shape: tuple[int, ...], first: int = 0) -> None:
    """See that all numbers are finite.

    Args:
        bits: from `bits_of`.
        name: of the tensor, for the message.
        shape: of the whole tensor.
        first: index of the first of `bits` in the flattened tensor.

    Raises:
        CheckpointError: one is not; its tensor and index are named.
    """
    where = first_not_finite(bits, dtype)
    if where is not None:
        value = _name_of(int(bits[where]), dtype)
        raise CheckpointError(
            f"{name}{_index(first + where, shape)} is {value}; weights must be finite numbers. Fetch the checkpoint again."
        )


def check_fits(bits: Bits, dtype: FloatType, name: str, shape: tuple[int, ...], first: int = 0) -> None:
    """See that finite numbers have stayed so in another type; arguments as in `check_finite`.

    Raises:
        CheckpointError: one was too large; its tensor and index are named.
    """
    where = first_not_finite(bits, dtype)
    if where is not None:
        raise CheckpointError(
            f"{name}{_index(first + where, shape)} is too large for {dtype}. Convert with --dtype bf16 or fp32."
        )


def _index(flat: int, shape: tuple[int, ...]) -> list[int]:
    return [int(i) for i in np.unravel_index(flat, shape)]


def _name_of(bits: int, dtype: str) -> str:
    """What a number that is not finite is called."""
    exponent = _EXPONENT[dtype]
    sign = 1 << (8 * FLOAT_BYTES[dtype] - 1)
    if bits & ~sign != exponent:
        return "NaN"
    return "-inf" if bits & sign else "inf"
