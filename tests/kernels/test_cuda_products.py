"""CUDA kernels on the host: activations rounded as on the CPU to the bit, or to half; products as the reference has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from cuda_sources import Argument, DeviceKernels, Kernels, kernels_of
from host_device import HostDevice
from stored_matrices import Matrix, Tiles

from moss_jt.config import Bits
from moss_jt.kernels import reference
from moss_jt.layout import TILE_ROWS, TileLayout
from moss_jt.ops import ROUND_BLOCK
from moss_jt.packing import dequantize, tile_layout

Array = npt.NDArray[Any]
WARPS, MANY = 8, 64  # of the kernels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(scope="module")
def rounding(folder: Path) -> Kernels:
    return kernels_of("rounding", folder)


@pytest.fixture(scope="module")
def products(folder: Path) -> Kernels:
    return kernels_of("linear_rounded", folder)


@pytest.fixture(scope="module")
def pointwise(folder: Path) -> Kernels:
    return kernels_of("pointwise", folder)


@pytest.fixture(scope="module")
def exact(folder: Path) -> Kernels:
    return kernels_of("linear_exact", folder)


Way = Literal["bytes", "halves"]  # how inputs are rounded
ENTRY: dict[Way, str] = {"bytes": "round_activations", "halves": "halve_activations"}


class Rounded:
    """Activations as the kernel rounds them."""

    def __init__(
        self,
        kernels: Kernels,
        x: Array,
        layout: TileLayout,
        perm: Array | None = None,
        *,
        gelu: bool = False,
        way: Way = "bytes",
    ) -> None:
        blocks = len(reference.rounding_blocks(layout, ROUND_BLOCK))
        tokens = len(x)
        self.codes: Array = np.zeros((tokens, layout.padded_in), np.int8 if way == "bytes" else np.float16)
        self.steps = np.zeros((blocks, tokens), np.float32)
        self.sums = np.zeros((blocks, tokens), np.int32)
        order = np.zeros(1, np.int32) if perm is None else perm
        sizes = (tokens, x.shape[1], layout.padded_in, layout.padded_group, ROUND_BLOCK, int(perm is not None))
        grid = (-(-blocks // WARPS), tokens)
        arguments: list[Argument] = [
            np.ascontiguousarray(x),
            order,
            self.codes,
            self.steps,
            self.sums,
            *sizes,
            int(gelu),
        ]
        kernels.launch(ENTRY[way], grid, 32 * WARPS, arguments)


def some_layout(k: int, bits: int, group: int) -> TileLayout:
    return tile_layout((16, k), 4 if bits == 4 else 8, group)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(
    ("k", "bits", "group"), [(8, 4, 8), (520, 4, 200), (1024, 8, 128), (132, 8, 64), (384, 4, 384)]
)
def test_rounding_gives_the_bits_of_the_cpu(rounding: Kernels, k: int, bits: int, group: int, tokens: int) -> None:
    x = np.random.default_rng(k).normal(size=(tokens, k)).astype(np.float32) * 3
    x[0, k // 2] = 0
    layout = some_layout(k, bits, group)
    found = Rounded(rounding, x, layout)
    blocks = reference.rounding_blocks(layout, ROUND_BLOCK)
    codes, steps = reference.round_activations(x, blocks)
    assert np.array_equal(found.codes, codes)
    assert np.array_equal(found.steps, steps.T)
    sums = [codes[:, start : start + size].sum(axis=1, dtype=np.int32) for _, start, size in blocks]
    assert np.array_equal(found.sums, np.array(sums))


IN_PLACE = np.array([0, 2, 1, 3])  # of four halves: the two in the middle change places


@pytest.mark.parametrize("size", [1.0, 1e-44, 1e-30, 1e-6, 7e4, 3e38])
@pytest.mark.parametrize(("k", "bits", "group"), [(8, 4, 8), (520, 4, 200), (132, 8, 64), (384, 4, 384)])
def test_halves_keep_eleven_bits_of_the_largest(rounding: Kernels, k: int, bits: int, group: int, size: float) -> None:
    x = (np.random.default_rng(k).uniform(-1, 1, size=(3, k)) * size).astype(np.float32)
    x[0, k // 2], x[1, : min(k, 64)] = 0, 0
    layout = some_layout(k, bits, group)
    found = Rounded(rounding, x, layout, way="halves")
    codes = found.codes.reshape(3, -1, 4)[:, :, IN_PLACE].reshape(3, -1).astype(np.float64)
    assert np.isfinite(codes).all() and np.abs(codes).max() <= 2**15
    for number, (_, start, length) in enumerate(reference.rounding_blocks(layout, ROUND_BLOCK)):
        run = slice(start, start + length)
        kept, step = codes[:, run] * found.steps[number][:, None], found.steps[number].astype(np.float64)
        assert (np.frexp(step)[0] == 0.5).all(), "powers of two: nothing else is rounded"
        real = np.zeros((3, length))
        real[:, : max(0, min(length, k - start))] = x[:, start : start + length]
        assert (np.abs(kept - real) <= np.maximum(np.abs(real) * 2.0**-11, step[:, None] * 2.0**-24)).all()
        assert (np.abs(real).max(axis=1) < 2**15 * step).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("way", ["bytes", "halves"])
def test_what_is_not_finite_spoils_its_block_only(rounding: Kernels, way: Way, bad: float) -> None:
    x = np.ones((2, 256), np.float32)
    x[1, 130] = bad
    found = Rounded(rounding, x, some_layout(256, 4, 128), way=way)
    assert np.isnan(found.steps).tolist() == [[False, False], [False, True]]
    assert (found.codes[1, 128:] == 0).all() and (found.codes[0] == (127 if way == "bytes" else 2**14)).all()


def test_gelu_comes_before_rounding(rounding: Kernels) -> None:
    x = np.random.default_rng(5).normal(size=(2, 256)).astype(np.float32) * 4
    layout = some_layout(256, 8, 128)
    found = Rounded(rounding, x, layout, gelu=True)
    kept = found.codes.reshape(2, 2, 128) * found.steps.T[:, :, None]
    off = np.abs(kept.reshape(2, 256) - reference.gelu(x))
    assert (off <= np.repeat(found.steps.T, 128, axis=1) * 0.501).all()


@pytest.mark.parametrize("width", [1, 3, 127, 129, 1024])
def test_layer_norm(pointwise: Kernels, width: int) -> None:
    rng = np.random.default_rng(width)
    x, weight, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((3, width), width, width))
    x += 5
    y = np.zeros_like(x)
    pointwise.launch("layer_norm", (3,), 256, [x, weight, bias, y, width, 1e-5])
    want = reference.layer_norm(x, weight, bias, 1e-5)
    assert np.abs(y - want).max() < 2e-5 * (1 + np.abs(want).max())


def test_gelu_and_sum(pointwise: Kernels) -> None:
    rng = np.random.default_rng(1)
    x, a, b = (rng.normal(size=300).astype(np.float32) * 5 for _ in range(3))
    x[:3] = [0, 40, -40]
    y, total = x.copy(), x.copy()
    pointwise.launch("gelu", (2,), 256, [y[:299], 299])
    np.testing.assert_allclose(y[:299], reference.gelu(x[:299]), rtol=2e-6, atol=1e-7)
    assert y[299] == x[299], "what lies behind is left alone"
    pointwise.launch("add_both", (2,), 256, [total, a, b, 300])
    np.testing.assert_allclose(total, x + a + b, rtol=1e-6, atol=1e-6)


class Product:
    """A random quantised matrix."""

    def __init__(self, case: Tiles) -> None:
        made = Matrix(case)
        assert made.codes is not None and isinstance(made.layout, TileLayout)
        self.matrix, self.layout, self.perm, self.blob = made.codes, made.layout, made.perm, made.blob
        self.bias = np.random.default_rng(case.n).normal(size=case.n).astype(np.float32)

    def run(
        self,
        rounding: Kernels,
        products: Kernels,
        x: Array,
        y: Array,
        *,
        way: Way = "bytes",
        cut: int | None = None,
        **options: Any,
    ) -> None:
        """Into y (T, wide), in pieces of `cut` tiles."""
        layout, tokens = self.layout, len(x)
        rounded = Rounded(rounding, x, layout, self.perm if layout.permuted else None, way=way)
        size = 8 if tokens <= 8 else 16 if tokens <= 16 else "many"
        cut = layout.n_tiles if cut is None else cut
        for tile in range(0, layout.n_tiles, cut):
            count = min(cut, layout.n_tiles - tile)
            rows = min(count * TILE_ROWS, layout.shape[0] - tile * TILE_ROWS)
            where = (layout.tile_bytes, layout.code_bytes, layout.code_bytes + layout.scale_bytes)
            sizes = (tokens, rows, tile * TILE_ROWS, *where, layout.padded_in, layout.padded_group, ROUND_BLOCK)
            piece = np.ascontiguousarray(self.blob[tile * layout.tile_bytes :])
            inputs = [piece, rounded.codes, rounded.steps, rounded.sums, self.bias if options.get("bias") else None]
            grid = (-(-tokens // MANY), -(-count // WARPS)) if size == "many" else (count,)
            rest = (y, *sizes, y.shape[1], int(options.get("add", False)))
            products.launch(f"{way}_int{layout.bits}_{size}", grid, 32 * WARPS, [*inputs, *rest])


CASES = [
    Tiles(1, 8, 4, 8),
    Tiles(3, 136, 4, 32),
    Tiles(17, 520, 4, 200),
    Tiles(127, 72, 4, 36, act_order=True),
    Tiles(129, 1024, 4, 1024),
    Tiles(48, 2560, 4, 128),
    Tiles(16, 4, 8, 4),
    Tiles(31, 132, 8, 64),
    Tiles(127, 520, 8, 260),
    Tiles(129, 384, 8, 128, act_order=True),
    Tiles(48, 2560, 8, 128),
]


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 16, 17, 65])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(rounding: Kernels, products: Kernels, case: Tiles, tokens: int) -> None:
    product, n = Product(case), case.n
    x = np.random.default_rng(tokens).normal(size=(tokens, case.k)).astype(np.float32)
    want = reference.linear_rounded(x, product.matrix, product.layout, product.perm, ROUND_BLOCK)
    y = np.full((tokens, n + 3), 7, np.float32)
    product.run(rounding, products, x, y)
    assert (y[:, n:] == 7).all(), "what lies beside the result is left alone"
    off = np.abs(y[:, :n] - want)
    assert off.max() <= 2e-6 * np.abs(want).max() * np.sqrt(case.k), (
        f"{off.max()} at {np.unravel_index(off.argmax(), off.shape)}"
    )


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 16, 17, 65])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_of_halves(rounding: Kernels, products: Kernels, case: Tiles, tokens: int) -> None:
    """Against the weights in float64; inputs lose their twelfth bit, and one of them is far larger than the others."""
    product, n = Product(case), case.n
    x = np.random.default_rng(tokens).normal(size=(tokens, case.k)).astype(np.float32)
    x[tokens // 2, case.k // 3] = 3e5  # more than a half can hold
    weights = dequantize(product.matrix).astype(np.float64)
    y = np.full((tokens, n + 3), 7, np.float32)
    product.run(rounding, products, x, y, way="halves")
    assert (y[:, n:] == 7).all(), "what lies beside the result is left alone"
    allowed = 2.0**-11 * (np.abs(x).astype(np.float64) @ np.abs(weights).T) + 1e-6
    off = np.abs(y[:, :n] - x.astype(np.float64) @ weights.T)
    assert (off <= allowed).all(), f"{(off / allowed).max()} of what is allowed"
    usual = np.sqrt((x.astype(np.float64) ** 2) @ (weights**2).T) * 2.0**-11
    assert (off <= 4 * usual + 1e-6).all(), "errors of single inputs go both ways"


@pytest.mark.parametrize("way", ["bytes", "halves"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_cut_the_company_and_the_place_change_no_bit(
    rounding: Kernels, products: Kernels, bits: Bits, way: Way
) -> None:
    """In pieces; one token alone, among nine, and among seventy."""
    product = Product(Tiles(70, 1408, bits, 128))
    x = np.random.default_rng(1).normal(size=(70, 1408)).astype(np.float32)
    whole = np.zeros((70, 70), np.float32)
    product.run(rounding, products, x, whole, way=way)
    for tokens, cut in ((70, 2), (9, None), (9, 1), (1, None), (1, 3)):
        y = np.zeros((tokens, 70), np.float32)
        product.run(rounding, products, x[60 : 60 + tokens] if tokens < 70 else x, y, cut=cut, way=way)
        assert np.array_equal(y, whole[60 : 60 + tokens] if tokens < 70 else whole), (tokens, cut)


@pytest.mark.parametrize("way", ["bytes", "halves"])
@pytest.mark.parametrize("tokens", [2, 18])
def test_bias_and_sum(rounding: Kernels, products: Kernels, tokens: int, way: Way) -> None:
    product = Product(Tiles(35, 256, 8, 128))
    x = np.random.default_rng(2).normal(size=(tokens, 256)).astype(np.float32)
    plain, full = np.zeros((tokens, 35), np.float32), np.full((tokens, 35), 3, np.float32)
    product.run(rounding, products, x, plain, way=way)
    product.run(rounding, products, x, full, bias=True, add=True, cut=1, way=way)
    np.testing.assert_allclose(full, plain + product.bias + 3, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", ["bytes", "halves"])
def test_a_token_that_is_not_finite_stays_alone(rounding: Kernels, products: Kernels, way: Way) -> None:
    product = Product(Tiles(16, 256, 4, 128))
    x = np.ones((3, 256), np.float32)
    x[1, 7] = np.nan
    y = np.zeros((3, 16), np.float32)
    product.run(rounding, products, x, y, way=way)
    assert np.isnan(y).all(axis=1).tolist() == [False, True, False]
    assert not np.isnan(y[[0, 2]]).any()


TOGETHER, ROW_WARPS = 4, 8  # of linear_exact.cu


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_products(exact: Kernels, case: Tiles, tokens: int) -> None:
    product, layout = Product(case), Product(case).layout
    wide = np.full((tokens, case.k + 2), np.nan, np.float32)
    wide[:, : case.k] = np.random.default_rng(tokens).normal(size=(tokens, case.k))
    y = np.full((tokens, case.n + 3), 7, np.float32)
    where = (layout.tile_bytes, layout.code_bytes, layout.code_bytes + layout.scale_bytes)
    order = product.perm.astype(np.int32) if layout.permuted else None
    for tile in range(layout.n_tiles):  # tile by tile
        rows = min(TILE_ROWS, case.n - tile * TILE_ROWS)
        sizes = (tokens, rows, tile * TILE_ROWS, *where, layout.padded_in, layout.padded_group, ROUND_BLOCK)
        piece = np.ascontiguousarray(product.blob[tile * layout.tile_bytes :])
        rest = (y, *sizes, wide.shape[1], y.shape[1], 0)
        grid = (1, -(-tokens // TOGETHER))
        exact.launch(f"exact_int{case.bits}", grid, 256, [wide, order, piece, product.bias, *rest])
    want = reference.linear(wide[:, : case.k], dequantize(product.matrix), product.bias)
    assert np.abs(y[:, : case.n] - want).max() <= 2e-6 * np.abs(want).max() * np.sqrt(case.k)
    assert (y[:, case.n :] == 7).all()


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 127), (129, 129), (24, 1024)])
def test_rows_in_floating_point(exact: Kernels, n: int, k: int, stored: str, tokens: int) -> None:
    rng = np.random.default_rng(n + k)
    x, weight = rng.normal(size=(tokens, k)).astype(np.float32), rng.normal(size=(n, k)).astype(np.float32)
    if stored == "bfloat16":
        blob = np.ascontiguousarray((weight.view(np.uint32) >> 16).astype(np.uint16))
        weight = (blob.astype(np.uint32) << 16).view(np.float32)
    else:
        blob = weight.astype(stored)
        weight = blob.astype(np.float32)
    y, first = np.ones((tokens, n), np.float32), n // 2
    for start, end in ((0, first), (first, n)):  # in two pieces, added
        grid = (-(-(end - start) // ROW_WARPS), -(-tokens // TOGETHER))
        if start < end:
            sizes = (tokens, end - start, start, k, k, n, 1)
            exact.launch(f"rows_{stored}", grid, 32 * ROW_WARPS, [x, blob[start:end], None, y, *sizes])
    want = reference.linear(x, weight) + 1
    assert np.abs(y - want).max() <= 2e-6 * (1 + np.abs(want).max()) * np.sqrt(k)


def test_kernels_of_a_device_take_the_same_arguments(folder: Path) -> None:
    """So that all of this can be run on one; here it is the host again."""
    x, bias = np.array([-1, 0, 2], np.float32), np.zeros(3, np.float32)
    found = [x.copy(), x.copy()]
    kernels_of("pointwise", folder).launch("gelu", (1,), 256, [found[0], 3])
    device = HostDevice(folder)
    DeviceKernels("pointwise", device).launch("gelu", (1,), 256, [found[1], 3])
    np.testing.assert_allclose(found[1], found[0], rtol=2e-6)  # a device has an exponential of its own
    assert found[0][2] != x[2]
    DeviceKernels("pointwise", device).launch("add_both", (1,), 256, [found[1], x, bias, 3])
    np.testing.assert_allclose(found[1], found[0] + x, rtol=1e-6)
    assert device.taken == 0
