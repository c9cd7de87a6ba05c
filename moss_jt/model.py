"""The whole transformer of MOSS, read top to bottom like the paper.

What is unusual about it:

- One layer norm a block; attention and MLP both start from it, and both are added to the input
  (a parallel residual): x = x + attention(ln(x)) + mlp(ln(x)).
- Positions enter by rotating the first `rotary_dim` channels of each head, in neighbouring pairs
  as in GPT-J; the rest of the head passes unrotated. There is no position embedding.
- The rows of qkv_proj lie in four slices, each query, value, key (a left-over of training on four
  devices). The attention kernels know that order.
- The head is its own matrix, with a bias; it is not tied to the embedding.

This file knows nothing of files, memory or devices. It calls the steps of an `Ops`: in place over
stored weights and a KV cache (moss_jt.ops), or with gradients (moss_jt.ops_grad).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from moss_jt.batch import Batch
from moss_jt.config import MossConfig
from moss_jt.ops import Linear

X = TypeVar("X")  # an activation: a buffer in place, a Var with gradients


class Ops(Protocol[X]):
    """The steps of a forward pass. Activations are (T, width), T the tokens of the batch."""

    def begin(self, batch: Batch) -> None:
        """Take up a new pass."""
        ...

    def block(self, name: str, compute: Callable[[X], X], x: X) -> X:
        """A whole block; `compute` calls its steps on `x`, unless they are known from before."""
        ...

    def layer_done(self, layer: int) -> None:
        """A block is through; may raise to break the pass off."""
        ...

    def embed(self, ids: npt.NDArray[np.int32], name: str) -> X:
        """Rows of the embedding."""
        ...

    def hidden(self, values: Any) -> X:
        """Hidden states from outside."""
        ...

    def layer_norm(self, x: X, name: str) -> X:
        """Normalise each token."""
        ...

    def linear(self, x: X, weight: Linear, into: str) -> X:
        """Multiply by a weight; `into` names the buffer where there are buffers."""
        ...

    def attention(self, qkv: X, layer: int) -> X:
        """Rotate, keep keys and values, attend."""
        ...

    def gelu(self, x: X, name: str) -> X:
        """The tanh form of GELU."""
        ...

    def residual(self, x: X, attn: X, mlp: X, name: str) -> X:
        """The sum of the three."""
        ...

    def logits(self, x: X, norm: str, head: Linear, wanted: npt.NDArray[np.int32]) -> Any:
        """Final norm and head of the chosen tokens."""
        ...


class Block(Generic[X]):
    """One transformer block, by the names of its tensors."""

    def __init__(self, layer: int) -> None:
        name = f"transformer.h.{layer}"
        self.layer = layer
        self.name = name
        self.ln_1 = f"{name}.ln_1"
        self.qkv_proj = Linear(f"{name}.attn.qkv_proj")
        self.out_proj = Linear(f"{name}.attn.out_proj")
        self.fc_in = Linear(f"{name}.mlp.fc_in", bias=True)
        self.fc_out = Linear(f"{name}.mlp.fc_out", bias=True)

    def execute(self, ops: Ops[X], x: X) -> X:
        """(T, C) to (T, C)."""
        h = ops.layer_norm(x, self.ln_1)

        qkv = ops.linear(h, self.qkv_proj, "qkv")  # (T, 3C)
        merged = ops.attention(qkv, self.layer)  # (T, C)
        attn = ops.linear(merged, self.out_proj, "attn")

        inner = ops.linear(h, self.fc_in, "inner")  # (T, F)
        inner = ops.gelu(inner, f"{self.name}.mlp.gelu")
        mlp = ops.linear(inner, self.fc_out, "mlp")

        return ops.residual(x, attn, mlp, self.name)


class Moss(Generic[X]):
    """MOSS, or a range of its layers.

    Attributes:
        config: the shape of the whole model.
        blocks: the blocks that this part computes.
        is_first, is_last: whether it embeds, and whether it ends in logits.
    """

    wte = "transformer.wte.weight"
    ln_f = "transformer.ln_f"
    lm_head = Linear("lm_head", bias=True)

    def __init__(self, config: MossConfig, layers: range | None = None) -> None:
        layers = range(config.n_layer) if layers is None else layers
        self.config = config
        self.blocks: list[Block[X]] = [Block(layer) for layer in layers]
        self.is_first = layers.start == 0
        self.is_last = layers.stop == config.n_layer

    def execute(self, ops: Ops[X], batch: Batch, hidden: Any = None) -> Any:
        """Compute the tokens of a batch.

        Args:
            ops: the steps, bound to weights and to a cache or a gradient graph.
            batch: T new tokens.
            hidden: (T, C) states of the layer before, where this part is not the first.

        Returns:
            logits (R, V) of the wanted tokens; hidden states (T, C) as an `Ops` activation where
            this part is not the last.
        """
        ops.begin(batch)
        x = ops.embed(batch.ids, self.wte) if self.is_first else ops.hidden(hidden)
        for block in self.blocks:
            x = ops.block(block.name, partial(block.execute, ops), x)
            ops.layer_done(block.layer)
        return ops.logits(x, self.ln_f, self.lm_head, batch.wanted) if self.is_last else x
