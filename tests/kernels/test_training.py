"""The kernels of training (training, training_attention): against float64 formulas, gradients against differences."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

Array = npt.NDArray[Any]

OPTIONS = ("oldest", "jittor")
SOURCE = """
#include <omp.h>
#include "training_attention.h"
using namespace moss_training;
extern "C" {
void norm(const float* x, const float* w, const float* b, float* y, float* kept, const float* dy, float* dx, float* dw,
          float* db, int64_t tokens, int64_t width, int threads) {
    omp_set_num_threads(threads);
    layer_norm(x, w, b, y, kept, tokens, width, 1e-5f);
    layer_norm_back(dy, x, w, kept, dx, dw, db, tokens, width);
}
void bend(const float* x, const float* b, float* y, const float* dy, float* dx, float* db, int64_t tokens,
          int64_t width, int threads) {
    omp_set_num_threads(threads);
    gelu(x, b, y, tokens, width);
    gelu_back(dy, x, b, dx, db, tokens, width);
}
void entropy(float* logits, const float* bias, const int32_t* labels, const float* weights, float* loss, float* right,
             int64_t rows, int64_t vocabulary) {
    cross_entropy(logits, bias, labels, weights, loss, right, rows, vocabulary);
}
void rows(const float* table, const int32_t* ids, float* y, const float* dy, float* dtable, int64_t tokens,
          int64_t width, int64_t count, int threads) {
    omp_set_num_threads(threads);
    take_rows(table, ids, y, tokens, width);
    take_rows_back(dy, ids, dtable, tokens, width, count);
}
void attention(const float* qkv, const int32_t* starts, const float* sincos, float* out, float* logsum,
               const float* dout, float* dqkv, int64_t sequences, int64_t shared, int64_t heads, int64_t width,
               int64_t rotary, int threads) {
    omp_set_num_threads(threads);
    const Heads s{heads, width, rotary};
    const Sequences all{starts, sequences, shared};
    attend(s, all, qkv, sincos, out, logsum);
    attend_back(s, all, {dout, qkv, out, logsum, sincos, dqkv});
}
void exps(const float* x, float* y, int64_t count) { for (int64_t i = 0; i < count; i++) y[i] = exp_of(x[i]); }
}
"""


@pytest.fixture(scope="module", params=OPTIONS)
def kernels(request: pytest.FixtureRequest, compile_kernels: Callable[[str, str], ctypes.CDLL]) -> ctypes.CDLL:
    return compile_kernels(SOURCE, request.param)


def call(function: Any, *arguments: Array | int) -> None:
    """Call a kernel with arrays as addresses and whole numbers as int64; the last of them may be the threads."""
    function.restype = None
    function(
        *[a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else ctypes.c_int64(a) for a in arguments]
    )


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def zeros(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


def slopes(function: Callable[[Array], Array], at: Array, weights: Array, step: float = 1e-5) -> Array:
    """The gradient of (function(at) * weights).sum() by differences, in float64."""
    at = at.astype(np.float64)
    found = np.zeros(at.size)
    for i in range(at.size):
        ends = []
        for sign in (1, -1):
            moved = at.copy()
            moved.flat[i] += sign * step
            ends.append(float((function(moved) * weights).sum()))
        found[i] = (ends[0] - ends[1]) / (2 * step)
    return found.reshape(at.shape)


def near(got: Array, want: Array, tolerance: float = 2e-5) -> None:
    difference = np.abs(got - want).max()
    assert difference <= tolerance * (1 + np.abs(want).max()), f"off by {difference:.2e}"


def norm_of(x: Array, w: Array, b: Array) -> Array:
    return np.asarray((x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) * w + b)


def gelu_of(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


@pytest.mark.parametrize(("tokens", "width"), [(1, 7), (5, 16), (37, 9)])
def test_layer_norm(kernels: ctypes.CDLL, tokens: int, width: int) -> None:
    x, w, b, dy = random(tokens, width), random(width, seed=1), random(width, seed=2), random(tokens, width, seed=3)
    y, kept, dx, dw, db = zeros(tokens, width), zeros(tokens, 2), zeros(tokens, width), zeros(width), zeros(width)
    call(kernels.norm, x, w, b, y, kept, dy, dx, dw, db, tokens, width, 2)
    near(y, norm_of(x.astype(np.float64), w, b))
    near(dx, slopes(lambda at: norm_of(at, w, b), x, dy), 1e-4)
    near(dw, slopes(lambda at: norm_of(x.astype(np.float64), at, b), w, dy), 1e-4)
    near(db, dy.sum(0))


@pytest.mark.parametrize(("tokens", "width"), [(1, 5), (41, 19)])
def test_gelu(kernels: ctypes.CDLL, tokens: int, width: int) -> None:
    x, b, dy = random(tokens, width) * 4, random(width, seed=1), random(tokens, width, seed=2)
    x[0, 0], x[0, 1] = 60, -60
    y, dx, db = zeros(tokens, width), zeros(tokens, width), zeros(width)
    call(kernels.bend, x, b, y, dy, dx, db, tokens, width, 2)
    near(y, gelu_of(x.astype(np.float64) + b), 1e-6)
    near(dx, slopes(lambda at: gelu_of(at + b), x, dy), 1e-5)
    near(db, dx.astype(np.float64).sum(0))


def test_exponential(kernels: ctypes.CDLL) -> None:
    x = np.linspace(-87, 88, 40_001, dtype=np.float32)
    y = np.zeros_like(x)
    call(kernels.exps, x, y, x.size)
    assert np.abs(y / np.exp(x.astype(np.float64)) - 1).max() < 3e-7


def test_cross_entropy(kernels: ctypes.CDLL) -> None:
    rows, vocabulary = 9, 33
    logits, bias, labels = random(rows, vocabulary) * 5, random(vocabulary, seed=1), np.arange(rows, dtype=np.int32) * 3
    logits[0, labels[0]] = 40
    weights = np.linspace(0.1, 1, rows, dtype=np.float32)
    sums = logits.astype(np.float64) + bias

    def losses(at: Array) -> Array:
        return np.asarray(np.log(np.exp(at).sum(1)) - at[np.arange(rows), labels])

    gradient, loss, right = logits.copy(), zeros(rows), zeros(rows)
    call(kernels.entropy, gradient, bias, labels, weights, loss, right, rows, vocabulary)
    near(loss, losses(sums))
    near(gradient, slopes(losses, sums, weights))
    assert right.tolist() == (sums.argmax(1) == labels).tolist()


def test_rows_of_a_table(kernels: ctypes.CDLL) -> None:
    table, ids, dy = random(20, 130), np.array([3, 19, 3, 0, 3], np.int32), random(5, 130, seed=1)
    want = np.zeros((20, 130))
    np.add.at(want, ids, dy)
    for threads in (1, 3):
        y, gradient = zeros(5, 130), random(20, 130)
        call(kernels.rows, table, ids, y, dy, gradient, 5, 130, 20, threads)
        assert np.array_equal(y, table[ids])
        near(gradient, want)


def split(qkv: Array, heads: int, width: int) -> tuple[Array, Array, Array]:
    """Queries, keys and values (H, T, D) of the checkpoint's four slices."""
    tokens = len(qkv)
    parts = qkv.reshape(tokens, 4, 3, heads // 4, width).transpose(2, 1, 3, 0, 4).reshape(3, heads, tokens, width)
    return parts[0], parts[2], parts[1]


def attend_one(qkv: Array, sincos: Array, heads: int, width: int, rotary: int) -> Array:
    """Attention of one sequence, (T, C), in the precision of `qkv`."""
    tokens = len(qkv)
    q, k, v = split(qkv, heads, width)
    sin, cos = sincos[:tokens, : rotary // 2], sincos[:tokens, rotary // 2 :]

    def rotate(x: Array) -> Array:
        even, odd, rest = x[..., 0:rotary:2], x[..., 1:rotary:2], x[..., rotary:]
        turned = np.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(*x.shape[:-1], rotary)
        return np.concatenate([turned, rest], axis=-1)

    scores = rotate(q) @ rotate(k).transpose(0, 2, 1) / np.sqrt(width)
    scores = np.where(np.tril(np.ones((tokens, tokens), bool)), scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    out = (shares / shares.sum(-1, keepdims=True)) @ v
    return np.asarray(out.transpose(1, 0, 2).reshape(tokens, heads * width))


@pytest.mark.parametrize(
    ("lengths", "shared", "shape"),
    [
        ([5], False, (4, 3, 2)),
        ([1, 4], False, (8, 5, 4)),
        ([70, 1, 33], False, (4, 40, 16)),
        ([6, 3, 1, 9], True, (4, 5, 4)),
        ([50, 60, 7], True, (4, 24, 8)),
    ],
)
def test_attention(kernels: ctypes.CDLL, lengths: list[int], shared: bool, shape: tuple[int, int, int]) -> None:
    """With a shared beginning the same as if it stood before each sequence; its gradients are the sum over them."""
    heads, width, rotary = shape
    tokens, embedding = sum(lengths), heads * width
    qkv, dout = random(tokens, 3 * embedding), random(tokens, embedding, seed=1)
    angles = np.arange(tokens)[:, None] / 100.0 ** (np.arange(rotary // 2) / rotary)
    sincos = np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32)
    starts = np.cumsum([0, *lengths], dtype=np.int32)
    found = []
    for threads in (1, 3):
        out, logsum, dqkv = zeros(tokens, embedding), zeros(heads, tokens), zeros(tokens, 3 * embedding)
        sizes = (len(lengths), lengths[0] if shared else 0, heads, width, rotary, threads)
        call(kernels.attention, qkv, starts, sincos, out, logsum, dout, dqkv, *sizes)
        found.append((out, dqkv))
    assert np.array_equal(found[0][0], found[1][0]) and np.array_equal(found[0][1], found[1][1])

    def attended(rows: Array) -> Array:
        parts = []
        for start, end in pairwise(starts):
            before = rows[: lengths[0]] if shared and start else rows[:0]
            parts.append(
                attend_one(np.concatenate([before, rows[start:end]]), sincos, heads, width, rotary)[len(before) :]
            )
        return np.concatenate(parts)

    exact = qkv.astype(np.float64)
    near(out, attended(exact))
    rng = np.random.default_rng(7)
    for _ in range(6):  # the slope along a random direction
        way = rng.normal(size=exact.shape)
        slope = sum(float((attended(exact + s * 1e-5 * way) * dout).sum()) * s for s in (1, -1)) / 2e-5
        assert float((dqkv * way).sum()) == pytest.approx(slope, rel=1e-3, abs=1e-3)
