"""Products with stored matrices as nodes of Jittor's graph: forward and backward, the matrices never change.

A matrix may be quantised and may be streamed: both ways it comes piece by piece from the store, as in
inference, and is never dequantised whole. A product runs at once, when its node is made and when gradients
are asked for; the arithmetic is float32, or what a device has for it (`moss_jt.frozen_device`). Gradients reach
the inputs, never the matrix.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moss_jt import startup
from moss_jt.launch import LINEAR, PERMUTE, TURN_BACK, TURN_PRODUCT, aligned, computing, run, share
from moss_jt.layout import TileLayout, round_up
from moss_jt.ops import layout_data
from moss_jt.weights import WeightStore

Var = Any
Floats = npt.NDArray[np.float32]

TOKEN_LANES, COLUMN_BLOCK = 16, 48  # kTokenLanes, kColumnBlock of the kernel: tokens and inputs are rounded up to these


class Frozen(Protocol):
    """Who multiplies by frozen matrices."""

    def begin_pass(self) -> None:
        """A pass over the layers begins."""
        ...

    def multiply(self, x: Floats, name: str) -> Floats:
        """The product with the matrix `name`, (N, K): (T, K) to (T, N).

        Raises:
            CheckpointError: there is no such matrix, or it cannot be read.
        """
        ...

    def multiply_transposed(self, dy: Floats, name: str) -> Floats:
        """The gradient of the product by its inputs: (T, N) to (T, K)."""
        ...


def frozen_node(products: Frozen, x: Var, name: str) -> Var:
    """`products.multiply` as a node of the graph, with gradients for x: (T, K) float32 to (T, N)."""
    return _node_class()(products, name)(x)


class FrozenProducts:
    """y = x W^T over the matrices of a store, on the host's processor.

    Args:
        store: whose matrices; it must stay open.
    """

    def __init__(self, store: WeightStore) -> None:
        self.store = store
        self._memory: dict[int, tuple[npt.NDArray[np.uint8], Var]] = {}
        self._nothing = share(np.zeros(2, np.float32))
        self._any_order = share(np.zeros(2, np.int32))

    def begin_pass(self) -> None:
        """A pass over the layers begins."""
        self.store.begin_pass()

    def multiply(self, x: Floats, name: str) -> Floats:
        """The product: (T, K) to (T, N)."""
        layout, perm = self.store.layout(name), self.store.perm(name)
        y = aligned((len(x), layout.shape[0]), "float32")
        with computing():
            inputs, stride = share(x), x.shape[1]
            if perm is not None:
                ordered = share(aligned((len(x), len(perm)), "float32"))
                sizes = {"tokens": len(x), "x_stride": stride, "padded_in": len(perm)}
                run(PERMUTE, [inputs, share(perm)], [ordered], sizes)
                inputs, stride = ordered, len(perm)
            self._each_piece(LINEAR, name, inputs, share(y), tokens=len(x), x_stride=stride, y_stride=y.shape[1])
        return y

    def multiply_transposed(self, dy: Floats, name: str) -> Floats:
        """The gradient of the product by its inputs: (T, N) to (T, K)."""
        layout, perm, tokens = self.store.layout(name), self.store.perm(name), len(dy)
        columns = layout.padded_in if isinstance(layout, TileLayout) else layout.shape[1]
        dx = aligned((tokens, layout.shape[1]), "float32")
        with computing():
            turned = share(aligned((round_up(columns, COLUMN_BLOCK), round_up(tokens, TOKEN_LANES)), "float32"))
            self._each_piece(TURN_PRODUCT, name, share(dy), turned, tokens=tokens, x_stride=0, y_stride=dy.shape[1])
            order = self._any_order if perm is None else share(perm)
            sizes = {"tokens": tokens, "columns": columns, "x_stride": dx.shape[1], "permuted": perm is not None}
            run(TURN_BACK, [turned, order], [share(dx)], sizes)
        return dx

    def _each_piece(self, source: str, name: str, given: Var, result: Var, **sizes: float) -> None:
        data = layout_data(self.store.layout(name)) | {"has_bias": False, "add": False} | sizes
        for piece in self.store.pieces(name):
            where = {"blob_at": piece.start, "first": piece.first, "out": piece.count}
            run(source, [given, self._memory_var(piece.data), self._nothing], [result], data | where)

    def _memory_var(self, data: npt.NDArray[np.uint8]) -> Var:
        """The Var on memory in which pieces of matrices lie; the store keeps few of them, for long."""
        kept = self._memory.get(id(data))
        if kept is None:
            kept = self._memory[id(data)] = (data, share(data))
        return kept[1]


@cache
def _node_class() -> Any:
    """The kind of node: a class of Jittor's, and Jittor is there only once it was started."""
    jt = startup.import_jittor(device="cpu")

    class FrozenProduct(jt.Function):  # type: ignore[misc, name-defined]
        """One product; it keeps neither inputs nor result."""

        def __init__(self, products: Frozen, name: str) -> None:
            super().__init__()
            self.products, self.name = products, name

        def execute(self, x: Var) -> Var:
            return jt.array(self.products.multiply(x.numpy(), self.name))

        def grad(self, dy: Var) -> Var:
            return jt.array(self.products.multiply_transposed(dy.numpy(), self.name))

    return FrozenProduct
