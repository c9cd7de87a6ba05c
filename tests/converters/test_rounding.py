"""Rounding to nearest: never worse than plain rounding, near the best there is, and what it says of its errors is so."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moss_jt.config import Bits, Quantization
from moss_jt.converters import rounding
from moss_jt.converters.rounding import Errors, RoundToNearest, measure
from moss_jt.converters.source import open_source
from moss_jt.packing import QuantMatrix, dequantize

Draw = Callable[[np.random.Generator, tuple[int, int]], Any]

DISTRIBUTIONS: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.standard_normal(shape) * 0.02,
    "laplace": lambda rng, shape: rng.laplace(size=shape) * 0.02,
    "student 3": lambda rng, shape: rng.standard_t(3, shape) * 0.02,
    "cauchy": lambda rng, shape: np.clip(rng.standard_cauchy(shape), -1e4, 1e4) * 0.02,
    "uniform": lambda rng, shape: rng.uniform(-0.05, 0.05, shape),
    "one side": lambda rng, shape: rng.uniform(0.5, 1, shape),
    "other side": lambda rng, shape: -rng.uniform(0.5, 1, shape),
    "skewed": lambda rng, shape: rng.gamma(2, size=shape) - 1,
    "one outlier": lambda rng, shape: np.where(rng.random(shape) < 0.01, 50, rng.standard_normal(shape)),
    "mostly zero": lambda rng, shape: np.where(rng.random(shape) < 0.9, 0, rng.standard_normal(shape)),
    "tiny": lambda rng, shape: rng.standard_normal(shape) * 1e-4,
}


def draw(name: str, shape: tuple[int, int] = (48, 512)) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Numbers of a distribution, as a float16 checkpoint has them."""
    numbers = DISTRIBUTIONS[name](np.random.default_rng(11), shape)
    return np.asarray(numbers, dtype=np.float16).astype(np.float32)


def plain(rows: np.ndarray[Any, Any], bits: int, size: int) -> np.ndarray[Any, Any]:
    """Plain rounding, group by group, in float64 but for the stored scale: (R, K)."""
    top = (1 << bits) - 1
    result = np.zeros_like(rows, dtype=np.float64)
    for row in range(rows.shape[0]):
        for start in range(0, rows.shape[1], size):
            group = rows[row, start : start + size].astype(np.float64)
            low, high = min(group.min(), 0), max(group.max(), 0)
            scale = float(np.float16((high - low) / top))
            if scale > 0:
                zero = min(max(round(-low / scale), 1), top + 1)
                codes = np.clip(np.rint(group / scale) + zero, 0, top)
                result[row, start : start + size] = (codes - zero) * scale
    return result


@pytest.mark.parametrize("name", list(DISTRIBUTIONS))
@pytest.mark.parametrize("size", [32, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_better_than_plain_rounding(bits: Bits, size: int, name: str) -> None:
    rows = draw(name)
    quantization = Quantization(bits, size)
    matrix = RoundToNearest().quantize("w", rows, quantization)
    found = measure(rows, matrix, quantization)
    off = dequantize(matrix).astype(np.float64) - rows
    off_plainly = plain(rows, bits, 512 if size == -1 else size) - rows
    assert found.signal == pytest.approx(np.square(rows, dtype=np.float64).sum(), rel=1e-6)
    assert found.error == pytest.approx(np.square(off).sum(), rel=1e-5)
    assert found.plain == pytest.approx(
        np.square(off_plainly).sum(), rel=1e-2
    )  # a quotient between two codes may round apart
    assert found.error < found.plain


@pytest.mark.parametrize("bits", [4, 8])
def test_no_group_is_worse(bits: Bits) -> None:
    rows = np.concatenate([draw(name, (8, 256)) for name in DISTRIBUTIONS])
    matrix = RoundToNearest().quantize("w", rows, Quantization(bits, 64))
    error = np.square(dequantize(matrix).astype(np.float64) - rows).reshape(-1, 64).sum(1)
    limit = np.square(plain(rows, bits, 64) - rows).reshape(-1, 64).sum(1)
    assert np.all(error <= limit * (1 + 1e-5))


@pytest.mark.parametrize("folder", ["tiny-fp/safetensors-fp16", "tiny-fp/safetensors-bf16", "tiny-fp-h8/bin-single"])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_matrix_of_the_golden_models(golden: Path, bits: Bits, folder: str) -> None:
    quantization = Quantization(bits, 32)
    with open_source(golden / folder) as source:
        for name, tensor in source.tensors.items():
            if len(tensor.shape) == 2 and name.startswith("transformer.h"):
                raw = source.read(name)
                wide = (raw.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == "bfloat16" else raw
                rows = wide.astype(np.float32)
                found = measure(rows, RoundToNearest().quantize(name, rows, quantization), quantization)
                assert 0 < found.error < found.plain, name


def test_near_the_best_there_is() -> None:
    """Every scale on a fine grid with every zero point, for a few groups."""
    rows = np.concatenate([draw("normal", (6, 64)), draw("student 3", (6, 64)), draw("skewed", (6, 64))])
    matrix = RoundToNearest().quantize("w", rows, Quantization(4, 64))
    found = np.square(dequantize(matrix) - rows, dtype=np.float64).sum(1)
    best = np.full(len(rows), np.inf)
    span = (np.maximum(rows.max(1), 0) - np.minimum(rows.min(1), 0)) / 15
    for shrink, zero in product(np.linspace(0.3, 1.1, 161), range(1, 17)):
        scale = (span * shrink).astype(np.float16).astype(np.float64)[:, None]
        off = (np.clip(np.rint(rows / scale) + zero, 0, 15) - zero) * scale - rows
        best = np.minimum(best, np.square(off).sum(1))
    assert found.sum() < 1.02 * best.sum()
    assert np.all(found < 1.15 * best)


def test_what_needs_no_rounding_gets_none() -> None:
    codes = np.random.default_rng(2).integers(0, 16, (4, 128))
    codes[:, :2] = 0, 15
    rows = ((codes - 5) * 0.25).astype(np.float32)
    matrix = RoundToNearest().quantize("w", rows, Quantization(4, 128))
    assert np.array_equal(dequantize(matrix), rows)
    assert np.array_equal(matrix.codes, codes)
    zeros = RoundToNearest().quantize("w", np.zeros((4, 128), np.float32), Quantization(4, 128))
    assert np.array_equal(dequantize(zeros), np.zeros((4, 128)))


@pytest.mark.parametrize("size", [7, 32, 100, 1500, -1])
def test_rows_do_not_depend_on_their_neighbours(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    rows = draw("student 3", (9, 3001))
    whole = RoundToNearest().quantize("w", rows, Quantization(4, size))
    assert whole.scales.shape == (9, 1 if size == -1 else -(-3001 // size))
    monkeypatch.setattr(rounding, "_NUMBERS_AT_ONCE", 30 * (3001 if size == -1 else size))
    for some in (slice(0, 4), slice(4, 9)):
        part = RoundToNearest().quantize("w", rows[some], Quantization(4, size))
        for field in ("codes", "scales", "zeros"):
            assert np.array_equal(getattr(part, field), getattr(whole, field)[some]), field


@pytest.mark.parametrize("bits", [4, 8])
def test_too_large_for_a_scale_is_infinite(bits: Bits) -> None:
    rows = draw("normal", (3, 256))
    rows[1, 130] = 3e38
    rows[1, 131] = -3e38
    scales = RoundToNearest().quantize("w", rows, Quantization(bits, 128)).scales
    assert np.argwhere(~np.isfinite(scales)).tolist() == [[1, 1]]


def test_errors_are_of_the_matrix_given() -> None:
    """Not of the one that this way of rounding would have made."""
    rows = draw("normal", (4, 100))
    made = RoundToNearest().quantize("w", rows, Quantization(4, 32))
    codes = made.codes ^ np.uint8(1)
    worse = measure(rows, QuantMatrix(codes, made.scales, made.zeros, made.groups), Quantization(4, 32))
    assert worse.error == pytest.approx(
        np.square(dequantize(QuantMatrix(codes, made.scales, made.zeros, made.groups)) - rows, dtype=np.float64).sum()
    )
    assert worse.error > worse.plain
    assert Errors(1, 2, 3) + Errors(10, 20, 30) == Errors(11, 22, 33)
