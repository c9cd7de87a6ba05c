"""The kernels' formulas in numpy, slow and obvious: what the fast ones are tested against.

Everything is computed in float64 from float32 inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """y = x W^T + bias: (T, K), (N, K), (N,) to (T, N)."""
    y: Array = x.astype(np.float64) @ weight.astype(np.float64).T
    return y if bias is None else y + bias


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
