"""The kernels' formulas in numpy, slow and obvious: what the fast ones are tested against.

Everything is computed in float64 from float32 inputs, apart from what says "to the bit" and the product of
rounded activations: these follow the kernel operation by operation. A fused multiply-add is taken in long
double, where the product is exact, and rounded to float.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt.layout import TileLayout
from moss_jt.packing import QuantMatrix

Array = npt.NDArray[Any]


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """y = x W^T + bias: (T, K), (N, K), (N,) to (T, N)."""
    y: Array = x.astype(np.float64) @ weight.astype(np.float64).T
    return y if bias is None else y + bias


def rounding_blocks(layout: TileLayout, block: int) -> list[tuple[int, int, int]]:
    """(group, first position, size) of the runs in which activations are rounded: at most `block`, inside a group."""
    blocks = []
    for group in range(layout.n_groups):
        start = group * layout.padded_group
        end = min(start + layout.padded_group, layout.padded_in)
        blocks += [(group, at, min(block, end - at)) for at in range(start, end, block)]
    return blocks


def round_activations(x: Array, blocks: list[tuple[int, int, int]]) -> tuple[Array, Array]:
    """Stored inputs (T, padded_in) float32 as codes, int8 of the same shape, and steps (T, blocks) float32."""
    codes = np.zeros(x.shape, np.int8)
    steps = np.zeros((len(x), len(blocks)), np.float32)
    for index, (_, start, size) in enumerate(blocks):
        part = x[:, start : start + size]
        finite = np.asarray(np.isfinite(part).all(axis=1))
        part = np.where(finite[:, None], part, np.float32(0))
        step = np.maximum(np.abs(part).max(axis=1) * np.float32(1 / 127), np.finfo(np.float32).tiny)
        codes[:, start : start + size] = np.rint(part * (np.float32(1) / step)[:, None])
        steps[:, index] = np.where(finite, step, np.float32(np.nan))
    return codes, steps


def linear_rounded(x: Array, matrix: QuantMatrix, layout: TileLayout, perm: Array, block: int) -> Array:
    """x W^T with x rounded: (T, K) float32 to (T, N) float32, in the kernel's order of operations."""
    x = np.where(perm < 0, np.float32(0), x[:, perm])
    weights = np.where(perm < 0, 0, matrix.codes[:, perm]).astype(np.int64)  # (N, padded_in)
    blocks = rounding_blocks(layout, block)
    codes, steps = round_activations(x, blocks)
    y = np.zeros((len(x), len(weights)), np.float32)
    for index, (group, start, size) in enumerate(blocks):
        here = codes[:, start : start + size].astype(np.int64)
        zeros = matrix.zeros[:, group].astype(np.int64) + 1
        whole = here @ weights[:, start : start + size].T - here.sum(axis=1)[:, None] * zeros
        y += whole.astype(np.float32) * (matrix.scales[:, group].astype(np.float32) * steps[:, index, None])
    return y


def linear_tiles(x: Array, matrix: QuantMatrix, layout: TileLayout, perm: Array) -> Array:
    """y = x W^T in float32, to the bit: (T, K) to (T, N); `perm` is the order of the inputs in the tiles.

    Of up to 128 positions of a group, the even ones and the odd ones are a chain of fused multiply-adds each.
    """
    inputs = np.where(perm < 0, 0, x[:, perm]).astype(np.longdouble)
    codes = np.where(perm < 0, 0, matrix.codes[:, perm]).astype(np.longdouble)
    y = np.zeros((len(x), layout.shape[0]), np.float32)
    for group, start, size in rounding_blocks(layout, 128):
        weights = codes[:, start : start + size] - (matrix.zeros[:, group, None].astype(np.longdouble) + 1)
        sums = np.zeros((2, *y.shape), np.float32)
        for p in range(size):
            sums[p % 2] = (inputs[:, start + p, None] * weights[None, :, p] + sums[p % 2]).astype(np.float32)
        y = y + (sums[0] + sums[1]) * matrix.scales[:, group].astype(np.float32)
    return y


def linear_rows(x: Array, weight: Array) -> Array:
    """y = x W^T in float32, to the bit: 8 partial sums of fused multiply-adds; (T, K), (N, K) to (T, N)."""
    pad = -x.shape[1] % 8
    x, weight = (np.pad(a.astype(np.longdouble), ((0, 0), (0, pad))) for a in (x, weight))
    sums = np.zeros((len(x), len(weight), 8), np.float32)
    for k in range(0, x.shape[1], 8):
        sums = (x[:, None, k : k + 8] * weight[None, :, k : k + 8] + sums).astype(np.float32)
    s0, s1, s2, s3 = (sums[:, :, i] + sums[:, :, i + 4] for i in range(4))
    return (s0 + s1) + (s2 + s3)


def transposed(dy: Array, weight: Array) -> Array:
    """dx = dy W in float32, to the bit: fused multiply-adds in the order of the rows; (T, N), (N, K) to (T, K)."""
    dx = np.zeros((len(dy), weight.shape[1]), np.float32)
    for row in range(len(weight)):
        dx = (dy[:, row : row + 1].astype(np.longdouble) * weight[row].astype(np.longdouble) + dx).astype(np.float32)
    return dx


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """Normalise the last axis by its mean and population variance."""
    wide = x.astype(np.float64)
    shifted = wide - wide.mean(axis=-1, keepdims=True)
    scaled: Array = shifted / np.sqrt((shifted**2).mean(axis=-1, keepdims=True) + eps)
    return scaled * weight + bias


def gelu(x: Array) -> Array:
    """gelu_new: 0.5 u (1 + tanh(sqrt(2/pi) (u + 0.044715 u^3)))."""
    u = x.astype(np.float64)
    y: Array = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
    return y


def rotate(x: Array, positions: Array, rotary_dim: int) -> Array:
    """Turn neighbouring pairs of the first `rotary_dim` channels; x is (T, H, D)."""
    exponents = np.arange(0, rotary_dim, 2) / rotary_dim
    angles = positions[:, None] / 10000.0**exponents  # (T, R/2)
    sin, cos = np.sin(angles)[:, None], np.cos(angles)[:, None]
    y = x.astype(np.float64).copy()
    even, odd = x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
    y[..., 0:rotary_dim:2] = even * cos - odd * sin
    y[..., 1:rotary_dim:2] = odd * cos + even * sin
    return y


def split_qkv(qkv: Array, heads: int) -> tuple[Array, Array, Array]:
    """(T, 3C) in four slices of query, value, key to query, key, value, each (T, H, D)."""
    tokens, width = qkv.shape
    slices = qkv.reshape(tokens, 4, 3, heads // 4, width // (3 * heads))
    query, value, key = (slices[:, :, part].reshape(tokens, heads, -1) for part in range(3))
    return query, key, value


def attention(qkv: Array, heads: int, rotary_dim: int, slots: Array, positions: Array) -> Array:
    """Causal attention among tokens of the same slot, all in one batch: (T, 3C) to (T, C)."""
    query, key, value = split_qkv(qkv, heads)
    query, key = rotate(query, positions, rotary_dim), rotate(key, positions, rotary_dim)
    scores = np.einsum("thd,shd->hts", query, key) / np.sqrt(query.shape[2])
    visible = (slots[:, None] == slots[None]) & (positions[None] <= positions[:, None])
    scores = np.where(visible, scores, -np.inf)
    shares = np.exp(scores - scores.max(axis=2, keepdims=True))
    shares /= shares.sum(axis=2, keepdims=True)
    merged: Array = np.einsum("hts,shd->thd", shares, value)
    return merged.reshape(len(qkv), -1)


def attend(queries: Array, keys: Array, values: Array, positions: Array) -> Array:
    """Queries at their positions over what a cache holds: (T, H, D), (H, S, D) twice, (T,) to (T, H, D)."""
    wide = [x.astype(np.float64) for x in (queries, keys, values)]
    scores = np.einsum("thd,hsd->hts", wide[0], wide[1]) / np.sqrt(queries.shape[2])
    visible = np.arange(keys.shape[1]) <= positions[:, None]
    scores = np.where(visible, scores, -np.inf)
    shares = np.exp(scores - scores.max(axis=2, keepdims=True))
    shares /= shares.sum(axis=2, keepdims=True)
    merged: Array = np.einsum("hts,hsd->thd", shares, wide[2])
    return merged


def store_int8(x: Array, channels: int) -> Array:
    """What is left of rows (..., D) after a cache kept them as int8, `channels` neighbours to a step."""
    kept = np.zeros_like(x, dtype=np.float32)
    for start in range(0, x.shape[-1], channels):
        group = x[..., start : start + channels].astype(np.float32)
        exact = np.maximum(np.abs(group).max(axis=-1, keepdims=True) * np.float32(1 / 127), np.finfo(np.float32).tiny)
        bits = exact.view(np.uint32)
        step = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)  # to bfloat16
        kept[..., start : start + channels] = np.rint(group * (np.float32(1) / step)) * step
    return kept
