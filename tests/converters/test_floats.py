"""Bits of floats: every bfloat16 and float16, rounding to nearest even, and the place of what is not finite."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moss_jt.converters.floats import bits_of, cast_bits, check_finite, check_fits, first_not_finite
from moss_jt.errors import CheckpointError


def test_every_bfloat16_survives_float32() -> None:
    every = np.arange(1 << 16, dtype="<u2")
    wide = cast_bits(every, "bfloat16", "float32")
    assert np.array_equal(wide >> 16, every)
    finite = np.isfinite(wide.view("<f4"))
    assert np.array_equal(cast_bits(wide[finite], "float32", "bfloat16"), every[finite])


def test_bfloat16_rounds_to_the_nearest_even() -> None:
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal(10_000).astype("<f4") * 10.0 ** rng.integers(-30, 30, 10_000)
    numbers = numbers.astype("<f4")
    numbers[:3] = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20]  # ties to even: down, up; above the tie: up
    found = cast_bits(bits_of(numbers, "float32"), "float32", "bfloat16").astype("<u4") << 16
    below = numbers.view("<u4") & 0xFFFF0000
    wanted = [_nearest(number, low) for number, low in zip(numbers, below, strict=True)]
    assert np.array_equal(found, np.array(wanted, dtype="<u4"))


def _nearest(number: Any, low: Any) -> int:
    """The nearer of two neighbours, the even one if both are as near."""
    high = int(low) + 0x10000
    down, up = (abs(float(np.uint32(bits).view("<f4")) - float(number)) for bits in (int(low), high))
    if down != up:
        return int(low) if down < up else high
    return int(low) if not int(low) & 0x10000 else high


def test_float16_casts_are_numpys() -> None:
    every = np.arange(1 << 16, dtype="<u2")
    finite = every[np.isfinite(every.view("<f2"))]
    wide = cast_bits(finite, "float16", "float32")
    assert np.array_equal(wide.view("<f4"), finite.view("<f2").astype("<f4"))
    assert np.array_equal(cast_bits(wide, "float32", "float16"), finite)
    double = finite.view("<f2").astype("<f8").view("<u8")
    assert np.array_equal(cast_bits(double, "float64", "float16"), finite)
    assert cast_bits(finite, "float16", "float16") is finite


@pytest.mark.parametrize(("dtype", "code"), [("float16", "<f2"), ("float32", "<f4"), ("float64", "<f8")])
@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "inf"), (-np.inf, "-inf")])
def test_the_first_that_is_not_finite_is_found(dtype: str, code: str, value: float, word: str) -> None:
    numbers = np.full((4, 5), np.finfo(code).max, dtype=code)
    assert first_not_finite(bits_of(numbers, dtype), dtype) is None
    numbers[2, 3] = value
    assert first_not_finite(bits_of(numbers, dtype), dtype) == 13
    with pytest.raises(CheckpointError, match=rf"lm_head\.weight\[2, 3\] is {word}; weights"):
        check_finite(bits_of(numbers, dtype), dtype, "lm_head.weight", (4, 5))


def test_pieces_count_from_their_place_in_the_tensor() -> None:
    bits = np.array([0x3F80, 0xFF80], dtype="<u2")
    with pytest.raises(CheckpointError, match=r"x\[5, 1\] is -inf"):
        check_finite(bits, "bfloat16", "x", (6, 2), first=10)
    assert first_not_finite(np.array([], dtype="<u2"), "bfloat16") is None


def test_numbers_too_large_are_named_with_a_way_out() -> None:
    numbers = np.array([1.0, 70000.0], dtype="<f4")
    cast = cast_bits(bits_of(numbers, "float32"), "float32", "float16")
    with pytest.raises(CheckpointError, match=r"x\[1\] is too large for float16. Convert with --dtype bf16 or fp32"):
        check_fits(cast, "float16", "x", (2,))
