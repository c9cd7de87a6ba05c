"""The steps of a forward pass with gradients, on Jittor's own operations: for training.

No cache, nothing in place. What is trained is given as Vars; what is not may stay in a store, quantised or
streamed, and gradients pass through it (`moss_jt.frozen`). The tokens of a batch are whole sequences from
position 0, all of the same length T (shorter ones are padded at the end by whoever makes the batch:
a causal model never looks at what comes after). Plain rather than fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt import startup
from moss_jt.batch import Batch
from moss_jt.config import QKV_SLICES, MossConfig
from moss_jt.errors import CheckpointError, ShapeError
from moss_jt.frozen import FrozenProducts
from moss_jt.ops import Linear, rotary_table
from moss_jt.weights import WeightStore

Var = Any


class GradientOps:
    """The steps over parameters given as Jittor Vars, and over frozen weights in a store.

    Args:
        config: the model's shape.
        parameters: float32 Vars by checkpoint name ("transformer.h.0.ln_1.weight", …), matrices (N, K);
            low-rank terms by the names that `Linear.low_rank` gives.
        store: where every name that is not a parameter is looked up. These weights get no gradients.
    """

    def __init__(self, config: MossConfig, parameters: Mapping[str, Var], store: WeightStore | None = None) -> None:
        self._jt = startup.import_jittor(device="cpu")
        self.config = config
        self.parameters = parameters
        self.store = store
        self._frozen = None if store is None else FrozenProducts(store)
        self.on_layer: Callable[[int], None] | None = None
        self._sequences = self._length = 0

    def begin(self, batch: Batch) -> None:
        """Take up a batch.

        Raises:
            ShapeError: the sequences do not all start at 0 and have one length.
        """
        slots = np.unique(batch.slots)
        length = batch.size // len(slots)
        grid = (np.repeat(slots, length), np.tile(np.arange(length), len(slots)))
        if not (np.array_equal(batch.slots, grid[0]) and np.array_equal(batch.positions, grid[1])):
            raise ShapeError(
                "training takes whole sequences of one length from position 0, one after the other; pad them at the end."
            )
        if self.store is not None:
            self.store.begin_pass()
        self._sequences, self._length = len(slots), length
        table = rotary_table(self.config)[:length]
        half = self.config.rotary_dim // 2
        self._sin = self._jt.array(table[:, :half].copy())
        self._cos = self._jt.array(table[:, half:].copy())

    def block(self, name: str, compute: Callable[[], Var]) -> Var:
        """A block of the network."""
        return compute()

    def layer_done(self, layer: int) -> None:
        """Say that a block is through."""
        if self.on_layer is not None:
            self.on_layer(layer)

    def embed(self, ids: npt.NDArray[np.int32], name: str) -> Var:
        """Rows of the embedding: (N,) ids to (N, C), N all tokens of the batch."""
        if name in self.parameters or self.store is None:
            return self._parameter(name)[self._jt.array(np.ascontiguousarray(ids))]
        return self._constant(self.store.rows(name, ids))

    def hidden(self, values: Var) -> Var:
        """Hidden states (N, C) of the layer before."""
        return values

    def layer_norm(self, x: Var, name: str) -> Var:
        """Normalise each token."""
        shifted = x - x.mean(dim=1, keepdims=True)
        variance = (shifted * shifted).mean(dim=1, keepdims=True)
        scaled = shifted / self._jt.sqrt(variance + self.config.layer_norm_epsilon)
        return scaled * self._parameter(name + ".weight") + self._parameter(name + ".bias")

    def linear(self, x: Var, weight: Linear, into: str) -> Var:
        """(N, K) to (N, M); `into` has no meaning here."""
        y = self._times(x, weight.name + ".weight")
        if weight.bias:
            y = y + self._parameter(weight.name + ".bias")
        if weight.low_rank is not None:
            a, b = weight.low_rank
            y = y + self._times(self._times(x, a), b) * weight.low_rank_scale
        return y

    def attention(self, qkv: Var, layer: int) -> Var:
        """Causal attention within each sequence: (N, 3C) to (N, C)."""
        jt, config = self._jt, self.config
        b, t, h, d = self._sequences, self._length, config.n_head, config.head_dim
        sliced = qkv.reshape(b, t, QKV_SLICES, 3, h // QKV_SLICES, d)
        q, v, k = (sliced[:, :, :, part].reshape(b, t, h, d).transpose(0, 2, 1, 3) for part in range(3))  # (B, H, T, D)
        q, k = self._rotate(q), self._rotate(k)
        scores = jt.matmul(q, k.transpose(0, 1, 3, 2)) / math.sqrt(d)  # (B, H, T, T)
        future = jt.array(np.triu(np.full((t, t), -1e30, np.float32), 1))
        shares = jt.nn.softmax(scores + future, dim=-1)
        return jt.matmul(shares, v).transpose(0, 2, 1, 3).reshape(b * t, h * d)

    def gelu(self, x: Var, name: str) -> Var:
        """gelu_new."""
        return 0.5 * x * (1.0 + self._jt.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))

    def residual(self, x: Var, attn: Var, mlp: Var, name: str) -> Var:
        """x + attn + mlp."""
        return x + attn + mlp

    def logits(self, x: Var, norm: str, head: Linear, wanted: npt.NDArray[np.int32]) -> Var:
        """Final norm and head of the chosen tokens: (R, V)."""
        if len(wanted) != x.shape[0]:
            x = x[self._jt.array(np.ascontiguousarray(wanted))]
        return self.linear(self.layer_norm(x, norm), head, "logits")

    def _parameter(self, name: str) -> Var:
        """A parameter; a norm or bias of the store where there is none of this name."""
        if name in self.parameters:
            return self.parameters[name]
        if self.store is None:
            raise CheckpointError(f"there is no parameter {name}.")
        return self._constant(self.store.small(name))

    def _constant(self, values: npt.NDArray[np.float32]) -> Var:
        return self._jt.array(values).stop_grad()

    def _times(self, x: Var, name: str) -> Var:
        if name in self.parameters or self._frozen is None:
            return self._jt.nn.matmul_transpose(x, self._parameter(name))
        return self._frozen(x, name)

    def _rotate(self, x: Var) -> Var:
        """Rotate neighbouring pairs of the first rotary_dim channels; x is (B, H, T, D)."""
        rotary = self.config.rotary_dim
        pairs = x[:, :, :, :rotary].reshape(*x.shape[:3], rotary // 2, 2)
        even, odd = pairs[..., 0], pairs[..., 1]
        turned = self._jt.stack([even * self._cos - odd * self._sin, odd * self._cos + even * self._sin], dim=-1)
        return self._jt.concat([turned.reshape(*x.shape[:3], rotary), x[:, :, :, rotary:]], dim=3)
