"""Choosing the numbers that stand for a matrix in int4 or int8: pure functions on arrays, and the seam for other ways.

A `Quantizer` turns rows of floats into codes, scales and zeros. `RoundToNearest` rounds every weight to
the nearest code and searches, for each group of inputs, the scale and the zero point that give the least
squared error. Short groups are laid side by side, one a column, so that numpy takes each step of the
search for hundreds of them at once.

For fixed codes t (zero point taken off) the best scale is s = <x, t> / <t, t>, and the error that it
leaves is |x|^2 - <x, t>^2 / <t, t>. So two sums judge a candidate and improve its scale along the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moss_jt.config import Bits, Quantization
from moss_jt.packing import QuantMatrix, inputs_per_group, plain_groups

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

_SHRINKS: dict[Bits, tuple[float, ...]] = {4: (1.0, 0.9, 0.8, 0.7, 0.6), 8: (1.0,)}
_NUDGES: dict[Bits, tuple[float, ...]] = {4: (0.05,), 8: (0.01, 0.005)}  # int8 gains where several scales are tried
_NUMBERS_AT_ONCE = 1 << 17  # half a MiB: less would leave numpy in the overhead of its calls
_APART = 272  # numbers: 1088 bytes
_LONGEST_COLUMN = 1024  # longer groups lie in rows
_LEAST_SCALE = 2.0**-25  # anything smaller is 0 in float16


class Quantizer(Protocol):
    """A way to choose codes, scales and zeros."""

    @property
    def label(self) -> str:
        """Its name and all that changes its results: an interrupted run goes on with the same only."""
        ...

    def quantize(self, name: str, rows: Floats, quantization: Quantization) -> QuantMatrix:
        """Quantise some rows of a matrix, each by itself; called by several threads at once.

        Args:
            name: of the tensor.
            rows: (R, K), finite.
            quantization: bits and group size.

        Returns:
            R rows, their groups runs of inputs. A scale too large for float16 is infinite.
        """
        ...


@dataclass(frozen=True)
class RoundToNearest:
    """Every weight to its nearest code, after a search for the scale and zero point of its group.

    The range from the least to the greatest weight is shrunk by several factors; scales a little below and
    above the best are tried, then zero points one below and one above. It is never worse than plain rounding,
    group by group.
    """

    @property
    def label(self) -> str:
        """Name and settings."""
        return f"nearest, least squares {_SHRINKS} {_NUDGES}"

    def quantize(self, name: str, rows: Floats, quantization: Quantization) -> QuantMatrix:
        """Quantise rows (R, K); see `Quantizer`."""
        n, k = rows.shape
        size = inputs_per_group(quantization.group_size, k)
        count = -(-k // size)
        found = QuantMatrix(
            np.empty((n, k), dtype=np.uint8),
            np.empty((n, count), dtype=np.float16),
            np.empty((n, count), dtype=np.uint8),
            plain_groups(k, size),
        )
        for part in _parts(k, size):
            flat = part.take(rows)
            codes = np.empty(flat.shape, dtype=np.uint8)
            scales, zeros = np.empty(len(flat), dtype=np.float16), np.empty(len(flat), dtype=np.uint8)
            memory = _memory_for(flat)
            for some in _some_at_a_time(flat):
                groups = _Groups(flat[some], quantization.bits, memory)
                with np.errstate(over="ignore", invalid="ignore"):  # of weights too large for a float16 scale
                    scale, zero = groups.search()
                    codes[some] = groups.codes(scale, zero)
                scales[some] = scale.reshape(-1)
                zeros[some] = zero.reshape(-1) - 1
            part.put(found, codes, scales, zeros)
        return found


@dataclass(frozen=True)
class Errors:
    """Sums of squares over some rows of a matrix.

    Attributes:
        signal: of the weights.
        error: of what they are off.
        plain: of what plain rounding would be off: codes spread evenly from the least to the greatest
            weight of a group, 0 included.
    """

    signal: float = 0.0
    error: float = 0.0
    plain: float = 0.0

    def __add__(self, other: Errors) -> Errors:
        return Errors(self.signal + other.signal, self.error + other.error, self.plain + other.plain)


def measure(rows: Floats, matrix: QuantMatrix, quantization: Quantization) -> Errors:
    """How well `matrix` stands for the rows (R, K) that it was made from."""
    k = rows.shape[1]
    size = inputs_per_group(quantization.group_size, k)
    total = Errors()
    for part in _parts(k, size):
        flat = part.take(rows)
        memory = _memory_for(flat)
        codes = part.take(matrix.codes)
        scales, zeros = (part.take_each(of).astype(np.float32) for of in (matrix.scales, matrix.zeros))
        for some in _some_at_a_time(flat):
            groups = _Groups(flat[some], quantization.bits, memory)
            signal = groups.squares()
            with np.errstate(over="ignore", invalid="ignore"):
                plain = groups.errors(*groups.plain())
            off = memory[0, : flat[some].size].reshape(-1, part.size)
            np.subtract(codes[some], zeros[some] + np.float32(1), out=off)
            off *= scales[some]
            off -= flat[some]
            np.multiply(off, off, out=off)
            total += Errors(*(float(np.sum(values, dtype=np.float64)) for values in (signal, off, plain)))
    return total


@dataclass(frozen=True)
class _Part:
    """The groups of one size: all but the last of a row, or the last where it is smaller.

    Attributes:
        inputs: that they cover.
        groups: which they are.
        size: inputs of each.
    """

    inputs: slice
    groups: slice
    size: int

    def take(self, rows: Array) -> Array:
        """The groups of all rows, (M, size)."""
        return rows[:, self.inputs].reshape(-1, self.size)

    def take_each(self, values: Array) -> Array:
        """What belongs to each group, from (R, G): (M, 1)."""
        return values[:, self.groups].reshape(-1, 1)

    def put(self, found: QuantMatrix, codes: Array, scales: Array, zeros: Array) -> None:
        """The inverse of `take`, into the arrays of a matrix."""
        n = len(found.codes)
        found.codes[:, self.inputs] = codes.reshape(n, -1)
        found.scales[:, self.groups] = scales.reshape(n, -1)
        found.zeros[:, self.groups] = zeros.reshape(n, -1)


def _parts(k: int, size: int) -> list[_Part]:
    """The groups of `k` inputs, by their size."""
    full, rest = divmod(k, size)
    parts = [_Part(slice(0, full * size), slice(0, full), size)]
    if rest:
        parts.append(_Part(slice(full * size, k), slice(full, full + 1), rest))
    return parts


def _some_at_a_time(flat: Array) -> Iterator[slice]:
    """As many groups as the cache takes."""
    step = max(1, _NUMBERS_AT_ONCE // flat.shape[1])
    return (slice(first, first + step) for first in range(0, len(flat), step))


def _memory_for(flat: Array) -> Floats:
    """Three arrays for some of the groups, to be used again and again: fresh memory costs page faults.

    They do not lie whole pages apart, since a store then delays loads from the same place of another page.
    """
    return np.empty((3, max(_NUMBERS_AT_ONCE, flat.shape[1]) + _APART), dtype=np.float32)


class _Groups:
    """Some groups of weights, and the best numbers for them that were found.

    Scales and zero points are float32 arrays that broadcast over `x`. The zero point is the whole one,
    1 to 2^bits: the format stores it minus 1.

    Args:
        flat: (M, size).
        bits: 4 or 8.
        memory: from `_memory_for`; the groups live in it until the next ones are made there.

    Attributes:
        x: the weights; a group is a column, or a row where it is long.
        low, high: the least and the greatest weight of each group, 0 included.
    """

    def __init__(self, flat: Floats, bits: Bits, memory: Floats) -> None:
        self._axis = 0 if flat.shape[1] <= _LONGEST_COLUMN else 1
        shape = flat.shape[::-1] if self._axis == 0 else flat.shape
        self.x, self._t, self._spare = (part[: flat.size].reshape(shape) for part in memory)
        self.x[...] = flat.T if self._axis == 0 else flat
        self.low: Floats = np.minimum(self.x.min(axis=self._axis, keepdims=True), 0)
        self.high: Floats = np.maximum(self.x.max(axis=self._axis, keepdims=True), 0)
        self._top = np.float32((1 << bits) - 1)  # the greatest code
        self._shrinks, self._nudges = _SHRINKS[bits], _NUDGES[bits]

    def plain(self) -> tuple[Floats, Floats]:
        """Scale, as float16 holds it, and zero point that spread the codes evenly over the weights."""
        scale = _as_stored(np.divide(self.high - self.low, self._top, dtype=np.float32))
        zero = np.rint(self.low * -_inverse(scale))
        return scale, np.clip(zero, 1, self._top + 1)

    def search(self) -> tuple[Floats, Floats]:
        """Scale, as float16 holds it, and zero point with the least squared error that was found."""
        plain_scale, plain_zero = self.plain()
        best = _Best(plain_scale, plain_zero)
        for shrink in self._shrinks:
            self._judge(plain_scale * np.float32(shrink), plain_zero, best)
        for nudge in self._nudges:
            below, above = best.scale * np.float32(1 - nudge), best.scale * np.float32(1 + nudge)
            self._judge(below, best.zero, best)
            self._judge(above, best.zero, best)
        self._judge(best.scale, best.zero, best)
        here, lower, upper = best.scale.copy(), best.zero - np.float32(1), best.zero + np.float32(1)
        self._judge(here, np.maximum(lower, 1), best)
        self._judge(here, np.minimum(upper, self._top + 1), best)
        self._judge(best.scale, best.zero, best)
        scale = _as_stored(best.scale)
        worse = ~(self.errors(scale, best.zero) <= self.errors(plain_scale, plain_zero))
        np.copyto(scale, plain_scale, where=worse)
        np.copyto(best.zero, plain_zero, where=worse)
        return scale, best.zero

    def squares(self) -> Floats:
        """The sum of squares of each group."""
        return self._sum_of_products(self.x, self.x)

    def errors(self, scale: Floats, zero: Floats) -> Floats:
        """The squared error of each group."""
        off = self._nearest(scale, zero)
        off *= scale
        off -= self.x
        return self._sum_of_products(off, off)

    def codes(self, scale: Floats, zero: Floats) -> npt.NDArray[np.uint8]:
        """The nearest codes, (M, size)."""
        codes = self._nearest(scale, zero)
        codes += zero
        small = codes.astype(np.uint8)
        return small.T if self._axis == 0 else small

    def _nearest(self, scale: Floats, zero: Floats) -> Floats:
        """The nearest codes, zero point taken off, in an array that the next call overwrites."""
        t = np.multiply(self.x, _inverse(scale), out=self._t)
        np.rint(t, out=t)
        np.maximum(t, -zero, out=t)
        np.minimum(t, self._top - zero, out=t)
        return t

    def _judge(self, scale: Floats, zero: Floats, best: _Best) -> None:
        """Try a candidate, with its scale improved, against the best."""
        t = self._nearest(scale, zero)
        product, square = self._sum_of_products(self.x, t), self._sum_of_products(t, t)
        improved = np.divide(product, square, out=scale.copy(), where=product > 0)
        best.take(product * improved, improved, zero)

    def _sum_of_products(self, a: Floats, b: Floats) -> Floats:
        total: Floats = np.add.reduce(np.multiply(a, b, out=self._spare), axis=self._axis, keepdims=True)
        return total


class _Best:
    """The best candidate of each group so far: what it explains of |x|^2, its scale, its zero point."""

    def __init__(self, scale: Floats, zero: Floats) -> None:
        self.gain = np.full_like(scale, -np.inf)
        self.scale, self.zero = scale.copy(), zero.copy()

    def take(self, gain: Floats, scale: Floats, zero: Floats) -> None:
        """Keep a candidate where it explains more; of equals the first stays."""
        wins = gain > self.gain
        np.copyto(self.gain, gain, where=wins)
        np.copyto(self.scale, scale, where=wins)
        np.copyto(self.zero, zero, where=wins)


def _inverse(scale: Floats) -> Floats:
    """1 / scale; 0 where the scale is."""
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > _LEAST_SCALE)


def _as_stored(scale: Floats) -> Floats:
    """A scale as float16 holds it."""
    return scale.astype(np.float16).astype(np.float32)
