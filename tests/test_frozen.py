"""Products with stored, frozen matrices in Jittor's graph: against dense ones and finite differences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from moss_jt.batch import Batch
from moss_jt.checkpoint import Checkpoint
from moss_jt.converters.hf2jittor import hf2jittor
from moss_jt.errors import CheckpointError
from moss_jt.frozen import COLUMN_BLOCK, TOKEN_LANES, FrozenProducts, frozen_node
from moss_jt.layout import TILE_ROWS, PlainLayout, RowsLayout, TileLayout
from moss_jt.model import Moss
from moss_jt.ops import Linear
from moss_jt.ops_grad import GradientOps
from moss_jt.packing import QuantMatrix, dequantize, pack, tile_layout, unpack
from moss_jt.weights import Piece, Stored, WeightStore, widen

Array = npt.NDArray[Any]

HEADER = Path(__file__).parents[1] / "kernels" / "cpu" / "transposed.h"
SETS = ["tiny-int4/g32", "tiny-int4/g32-actorder", "tiny-int8/g128", "tiny-fp/safetensors-bf16"]


class CutStore(WeightStore):
    """A store that hands matrices out in small pieces, each in the same memory, as when they are streamed."""

    def __init__(self, checkpoint: Checkpoint | None = None) -> None:
        super().__init__(checkpoint)
        self._ring = np.zeros(1 << 20, np.uint8)

    def pieces(self, name: str) -> Iterator[Piece]:
        layout, whole = self.layout(name), self.read(name)
        rows, nbytes = (TILE_ROWS, layout.tile_bytes) if isinstance(layout, TileLayout) else (1, layout.row_bytes)
        step = 3 * rows
        for first in range(0, layout.shape[0], step):
            count = min(step, layout.shape[0] - first)
            data = whole[first // rows * nbytes :][: -(-count // rows) * nbytes]
            self._ring[:] = 0xA5
            self._ring[24 : 24 + data.size] = data
            yield Piece(name, layout, self._ring, 24, first, count)


def put_random(store: WeightStore, name: str, n: int, k: int, *, bits: Any, act_order: bool = False) -> Array:
    """Put a random matrix into a store, and say what its values are."""
    rng = np.random.default_rng(n + k)
    groups = (np.arange(k) // 32).astype(np.int32)
    groups = rng.permutation(groups).astype(np.int32) if act_order else groups
    shape = (n, -(-k // 32))
    codes = rng.integers(0, 2**bits, (n, k)).astype(np.uint8)
    zeros = rng.integers(0, 2**bits, shape).astype(np.uint8)
    matrix = QuantMatrix(codes, rng.uniform(1e-3, 2e-2, shape).astype(np.float16), zeros, groups)
    layout = tile_layout((n, k), bits, 32, groups)
    store.put(Stored(name, pack(matrix, layout), layout))
    return dequantize(matrix)


def test_sizes_are_those_of_the_kernel() -> None:
    text = HEADER.read_text("utf-8")
    assert f"kTokenLanes = {TOKEN_LANES};" in text
    assert f"kColumnBlock = {COLUMN_BLOCK};" in text


@pytest.mark.parametrize("tokens", [1, 3, 129])
@pytest.mark.parametrize("kind", [(33, 96, 4, False), (129, 70, 4, True), (64, 100, 8, False), (20, 96, 8, True)])
def test_products_and_gradients_of_a_quantised_matrix(
    jittor: Any, tokens: int, kind: tuple[int, int, int, bool]
) -> None:
    n, k, bits, act_order = kind
    store = CutStore()
    weight = put_random(store, "w", n, k, bits=bits, act_order=act_order).astype(np.float64)
    rng = np.random.default_rng(tokens)
    x, dy = (rng.normal(size=(tokens, size)).astype(np.float32) for size in (k, n))
    var = jittor.array(x)
    y = frozen_node(FrozenProducts(store), var, "w")
    near(y.numpy(), x @ weight.T, 1e-5)
    (dx,) = jittor.grad((y * jittor.array(dy)).sum(), [var])
    near(dx.numpy(), dy @ weight, 1e-5)


def near(got: Array, want: Array, tolerance: float) -> None:
    difference = np.abs(got - want)
    limit = tolerance * max(1e-30, np.abs(want).max())
    where = np.unravel_index(difference.argmax(), difference.shape)
    assert difference.max() <= limit, f"off by {difference.max():.2e} at {where}, allowed {limit:.2e}"


def test_cuts_change_no_bit(jittor: Any) -> None:
    whole, cut = WeightStore(), CutStore()
    for store in (whole, cut):
        put_random(store, "w", 129, 96, bits=4, act_order=True)
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(size=(5, size)).astype(np.float32) for size in (96, 129))
    one, other = FrozenProducts(whole), FrozenProducts(cut)
    np.testing.assert_array_equal(one.multiply(x, "w"), other.multiply(x, "w"))
    np.testing.assert_array_equal(one.multiply_transposed(dy, "w"), other.multiply_transposed(dy, "w"))


def test_a_matrix_that_is_missing_is_named(jittor: Any) -> None:
    with pytest.raises(CheckpointError, match=r"has no matrix blocks\.9"):
        frozen_node(FrozenProducts(WeightStore()), jittor.ones((2, 4)), "blocks.9")


@pytest.fixture(scope="module", params=SETS)
def checkpoint(request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    target = tmp_path_factory.mktemp("native") / "model"
    hf2jittor(golden / request.param, target)
    return Checkpoint.open(target)


def adapted(checkpoint: Checkpoint, rank: int = 3) -> tuple[Moss[Any], dict[str, Array]]:
    """A model with low-rank terms at the projections of attention and at fc_out, and their values."""
    model: Moss[Any] = Moss(checkpoint.config)
    rng, values = np.random.default_rng(5), {}
    for block in model.blocks:
        for part in ("qkv_proj", "out_proj", "fc_out"):
            linear: Linear = getattr(block, part)
            n, k = checkpoint.entries[linear.name + ".weight"].layout.shape
            names = (linear.name + ".a", linear.name + ".b")
            values[names[0]] = (rng.normal(size=(rank, k)) / np.sqrt(k)).astype(np.float32)
            values[names[1]] = (rng.normal(size=(n, rank)) * 0.1).astype(np.float32)
            setattr(block, part, replace(linear, low_rank=names, low_rank_scale=0.5))
    return model, values


def loss_of(jt: Any, model: Moss[Any], ops: GradientOps, ids: Array) -> Any:
    """Cross-entropy of two sequences, each token from those before it."""
    length, vocabulary = ids.shape[1], ops.config.vocab_size
    positions = np.tile(np.arange(length, dtype=np.int32), 2)
    wanted = np.arange(2 * length, dtype=np.int32)
    batch = Batch(ids.reshape(-1), np.repeat([0, 1], length).astype(np.int32), positions, wanted)
    logits = model.execute(ops, batch).reshape(2, length, -1)[:, :-1]
    return jt.nn.cross_entropy_loss(logits.reshape(-1, vocabulary), jt.array(ids[:, 1:].reshape(-1).copy()))


def test_training_low_rank_terms_over_a_store(jittor: Any, checkpoint: Checkpoint) -> None:
    """Loss and gradients equal those of the whole model in floats, where everything is a parameter."""
    jt = jittor
    ids = np.random.default_rng(1).integers(0, checkpoint.config.vocab_size, (2, 9)).astype(np.int32)
    model, values = adapted(checkpoint)
    store = CutStore(checkpoint)
    trained = {name: jt.array(value) for name, value in values.items()}
    loss = loss_of(jt, model, GradientOps(checkpoint.config, trained, store=store), ids)
    gradients = jt.grad(loss, list(trained.values()))

    dense: dict[str, Any] = {}
    for name, entry in checkpoint.entries.items():
        small = isinstance(entry.layout, PlainLayout)
        dense[name] = jt.array(store.small(name) if small else dense_of(checkpoint, name))
    dense |= {name: jt.array(value) for name, value in values.items()}
    want = loss_of(jt, model, GradientOps(checkpoint.config, dense), ids)
    assert abs(loss.item() - want.item()) < 1e-5
    for name, got, dense_gradient in zip(
        values, gradients, jt.grad(want, [dense[name] for name in values]), strict=True
    ):
        assert np.abs(dense_gradient.numpy()).max() > 0, f"{name} has no gradient to compare"
        near(got.numpy(), dense_gradient.numpy(), 1e-4)


def dense_of(checkpoint: Checkpoint, name: str) -> Array:
    """The values of a matrix of a file."""
    layout, blob = checkpoint.entries[name].layout, checkpoint.read(name)
    if isinstance(layout, TileLayout):
        return dequantize(unpack(blob, layout))
    assert isinstance(layout, RowsLayout)
    return widen(blob[: layout.shape[0] * layout.row_bytes], layout.dtype).reshape(layout.shape)


@pytest.mark.parametrize("checkpoint", ["tiny-int4/g32"], indirect=True)
def test_gradients_of_low_rank_terms_are_differences_of_the_loss(jittor: Any, checkpoint: Checkpoint) -> None:
    jt = jittor
    ids = np.random.default_rng(2).integers(0, checkpoint.config.vocab_size, (2, 7)).astype(np.int32)
    model, values = adapted(checkpoint)
    store = CutStore(checkpoint)

    def loss(moved: dict[str, Array]) -> Any:
        trained = {name: jt.array(value) for name, value in moved.items()}
        return trained, loss_of(jt, model, GradientOps(checkpoint.config, trained, store=store), ids)

    trained, here = loss(values)
    gradients = {name: var.numpy() for name, var in zip(values, jt.grad(here, list(trained.values())), strict=True)}
    for name in list(values)[:4] + list(values)[-2:]:
        direction = np.sign(gradients[name])  # the slope along it is the sum of magnitudes: well above rounding
        step = 2e-3
        ends = [loss(values | {name: values[name] + np.float32(s * step) * direction})[1].item() for s in (1, -1)]
        slope, want = (ends[0] - ends[1]) / (2 * step), float(np.abs(gradients[name]).sum())
        assert abs(slope - want) < 0.02 * want + 2e-4, f"{name}: slope {slope:.5f}, gradient {want:.5f}"
