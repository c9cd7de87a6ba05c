"""The CPU kernels (numbers, linear, pointwise, attention) against numpy, through the ops that launch them.

Odd sizes stand beside round ones. Tolerances are relative to the size of the result: float32 sums
of K terms are off by about sqrt(K) * 6e-8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest

from moss_jt.batch import Batch
from moss_jt.cache import KVCache, KVType
from moss_jt.config import Bits, FloatType, MossConfig
from moss_jt.kernels import reference
from moss_jt.launch import share, warm_up
from moss_jt.layout import RowsLayout, TileLayout
from moss_jt.ops import InferenceOps, Linear, rotary_table
from moss_jt.packing import QuantMatrix, dequantize, pack, tile_layout
from moss_jt.weights import Stored, WeightStore, widen

Array = npt.NDArray[Any]


class Bench:
    """Ops over a store that a test fills; widths are free where the kernel's are."""

    def __init__(
        self, width: int, inner: int, *, heads: int = 4, rotary: int = 2, kind: KVType = "float32", positions: int = 300
    ) -> None:
        self.config = MossConfig(
            vocab_size=8, n_positions=positions, n_embd=width, n_layer=1, n_head=heads, rotary_dim=rotary, n_inner=inner
        )
        self.store = WeightStore()
        self.cache = KVCache(self.config, slots=3, tokens=3 * positions, kind=kind)
        self.ops = InferenceOps(self.config, self.store, self.cache, capacity=160)

    def begin(self, tokens: int) -> None:
        index = np.arange(tokens, dtype=np.int32)
        self.ops.begin(Batch(index, np.zeros(tokens, np.int32), index, index[:1]))


def near(got: Array, want: Array, tolerance: float) -> None:
    difference = np.abs(got - want)
    limit = tolerance * max(1e-30, np.abs(want).max())
    where = np.unravel_index(difference.argmax(), difference.shape)
    assert difference.max() <= limit, f"off by {difference.max():.2e} at {where}, allowed {limit:.2e}"


@dataclass(frozen=True)
class Case:
    """A quantised matrix to make."""

    n: int
    k: int
    bits: Bits
    group: int
    act_order: bool = False


def random_matrix(rng: np.random.Generator, case: Case) -> tuple[QuantMatrix, TileLayout]:
    n, k, bits, group = case.n, case.k, case.bits, case.group
    groups = (np.arange(k) // group).astype(np.int32)
    if case.act_order:
        groups = rng.permutation(groups).astype(np.int32)
    count = -(-k // group)
    matrix = QuantMatrix(
        codes=rng.integers(0, 2**bits, (n, k)).astype(np.uint8),
        scales=rng.uniform(1e-3, 2e-2, (n, count)).astype(np.float16),
        zeros=rng.integers(0, 2**bits, (n, count)).astype(np.uint8),
        groups=groups,
    )
    return matrix, tile_layout((n, k), bits, group, groups)


@pytest.mark.parametrize("tokens", [1, 2, 3, 127, 129])
@pytest.mark.parametrize(
    "case",
    [
        Case(16, 8, 4, 8),
        Case(17, 128, 4, 128),
        Case(1, 136, 4, 32),
        Case(129, 256, 4, 32, act_order=True),
        Case(127, 72, 4, 36, act_order=True),
        Case(33, 1024, 4, 1024),
        Case(16, 4, 8, 4),
        Case(31, 132, 8, 64),
        Case(129, 256, 8, 128, act_order=True),
        Case(15, 36, 8, 9, act_order=True),
    ],
    ids=str,
)
def test_linear_quantised(jittor: Any, tokens: int, case: Case) -> None:
    n, k = case.n, case.k
    rng = np.random.default_rng(n * k + tokens)
    matrix, layout = random_matrix(rng, case)
    bench = Bench(width=max(8, 4 * k), inner=max(n, 4))
    bench.store.put(Stored("w.weight", pack(matrix, layout), layout))
    bench.store.add("w.bias", rng.normal(size=n))
    x = rng.normal(size=(tokens, k)).astype(np.float32)
    near(run_linear(bench, x, n), reference.linear(x, dequantize(matrix), bench.store.small("w.bias")), 2e-5)


@pytest.mark.parametrize("tokens", [1, 3, 129])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 7), (5, 16), (127, 129), (64, 513)])
@pytest.mark.parametrize("dtype", get_args(FloatType))
def test_linear_float(jittor: Any, tokens: int, n: int, k: int, dtype: FloatType) -> None:
    rng = np.random.default_rng(n * k + tokens)
    bits16 = rng.normal(size=(n, k)).astype(np.float16 if dtype == "float16" else np.float32)
    raw = bits16.view(np.uint32) >> 16 if dtype == "bfloat16" else bits16
    data = np.ascontiguousarray(raw.astype(np.uint16) if dtype == "bfloat16" else raw).reshape(-1).view(np.uint8)
    layout = RowsLayout((n, k), dtype)
    blob = np.zeros(layout.nbytes, np.uint8)
    blob[: data.size] = data
    bench = Bench(width=max(8, 4 * k), inner=max(n, 4))
    bench.store.put(Stored("w.weight", blob, layout))
    bench.store.add("w.bias", rng.normal(size=n))
    x = rng.normal(size=(tokens, k)).astype(np.float32)
    weight = widen(data, dtype).reshape(n, k)
    near(run_linear(bench, x, n), reference.linear(x, weight, bench.store.small("w.bias")), 1e-5)


def run_linear(bench: Bench, x: Array, n: int) -> Array:
    """Inputs are the first channels of a wider buffer, as the outputs are of theirs: strides are tested too."""
    bench.begin(len(x))
    wide = np.full((len(x), bench.config.n_embd), np.nan, np.float32)
    wide[:, : x.shape[1]] = x
    buffer = bench.ops.hidden(wide)
    return bench.ops.values(bench.ops.linear(buffer, Linear("w", bias=True), "inner"))[:, :n]


def test_halves_of_every_kind(jittor: Any) -> None:
    """Each of the 65,536 halves, subnormals and signed zeros too, widens to the float that numpy gives.

    Infinities and NaN are refused when a checkpoint is converted, and -Ofast may not keep them.
    """
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)].reshape(-1, 1)
    layout = RowsLayout((len(finite), 1), "float16")
    blob = np.zeros(layout.nbytes, np.uint8)
    blob[: finite.nbytes] = finite.reshape(-1).view(np.uint8)
    bench = Bench(width=8, inner=len(finite))
    bench.store.put(Stored("w.weight", blob, layout))
    bench.store.add("w.bias", np.zeros(len(finite)))
    got = run_linear(bench, np.ones((1, 1), np.float32), len(finite))
    np.testing.assert_array_equal(got[0], finite[:, 0].astype(np.float32))


def test_nothing_is_shared_that_jittor_would_copy(jittor: Any) -> None:
    """It takes an array of shape (1,) for a constant: later changes were lost, and it compiled at run time."""
    with pytest.raises(AssertionError):
        share(np.zeros(1, np.float32))
    array = np.zeros((1, 1), np.float32)
    var = share(array)
    array[0, 0] = 5
    assert var.numpy() == 5


@pytest.mark.parametrize("width", [8, 12, 128, 1028])
def test_layer_norm(jittor: Any, width: int) -> None:
    rng = np.random.default_rng(width)
    bench = Bench(width=width, inner=4)
    weight, bias = (rng.normal(size=width).astype(np.float32) for _ in range(2))
    bench.store.add("n.weight", weight)
    bench.store.add("n.bias", bias)
    x = (rng.normal(size=(5, width)) * 3 + 100).astype(np.float32)
    bench.begin(5)
    got = bench.ops.values(bench.ops.layer_norm(bench.ops.hidden(x), "n"))
    near(got, reference.layer_norm(x, weight, bias, bench.config.layer_norm_epsilon), 1e-5)


def test_gelu_and_residual(jittor: Any) -> None:
    rng = np.random.default_rng(0)
    bench = Bench(width=12, inner=37)
    bench.begin(7)
    inner = bench.ops.buffers["inner"]
    values = (rng.normal(size=(7, 37)) * 4).astype(np.float32)
    inner.array[:7] = values
    near(bench.ops.values(bench.ops.gelu(inner, "g")), reference.gelu(values), 1e-6)
    parts = [rng.normal(size=(7, 12)).astype(np.float32) for _ in range(3)]
    x, attn, mlp = (bench.ops.buffers[name] for name in ("x", "attn", "mlp"))
    for buffer, part in zip((x, attn, mlp), parts, strict=True):
        buffer.array[:7] = part
    near(bench.ops.values(bench.ops.residual(x, attn, mlp, "r")), parts[0] + parts[1] + parts[2], 1e-6)


def test_rotary_table_is_that_of_the_formula() -> None:
    config = MossConfig(vocab_size=8, n_positions=2048, n_embd=1024, n_layer=1, n_head=4, rotary_dim=64)
    exponents = np.arange(0, 64, 2) / 64
    angles = np.arange(2048)[:, None] / 10000.0**exponents
    want = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    assert np.abs(rotary_table(config) - want).max() < 2048 * 2e-7  # float32 angles


def test_subnormal_numbers_survive_the_kernels(jittor: Any) -> None:
    """Libraries linked with -Ofast set the processor to flush them to zero, for numpy as well."""
    warm_up()
    assert np.float32(1e-40) * np.float32(1) != 0
