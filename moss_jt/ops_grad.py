"""The steps of a forward pass with gradients: for training.

No cache, nothing in place. What is trained is given as Vars; what is not may stay in a store, quantised or
streamed, and gradients pass through it (`moss_jt.frozen`). The tokens of a batch are whole sequences from
position 0, one after the other, of any lengths: there is no padding. Or the first is what all others begin with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moss_jt import nodes, startup
from moss_jt.batch import Batch
from moss_jt.config import MossConfig
from moss_jt.errors import CheckpointError, ShapeError
from moss_jt.frozen import Frozen, FrozenProducts, frozen_node
from moss_jt.ops import Linear, rotary_table
from moss_jt.weights import WeightStore

Var = Any

CHUNK_NUMBERS = 8 << 20  # logits that are in memory at once in the loss


class Unbiased(NamedTuple):
    """A product and the bias that whoever takes it adds."""

    product: Var
    bias: Var


class GradientOps:
    """The steps over parameters given as Jittor Vars, and over frozen weights in a store.

    Args:
        config: the model's shape.
        parameters: float32 Vars by checkpoint name ("transformer.h.0.ln_1.weight", …), matrices (N, K);
            low-rank terms by the names that `Linear.low_rank` gives.
        store: where every name that is not a parameter is looked up. These weights get no gradients.
        frozen: who multiplies by the matrices of the store; None for the host's processor.
        recompute: keep only what enters a block, and compute the block once more for the gradients.
    """

    def __init__(
        self,
        config: MossConfig,
        parameters: Mapping[str, Var],
        store: WeightStore | None = None,
        *,
        frozen: Frozen | None = None,
        recompute: bool = False,
    ) -> None:
        self._jt = startup.import_jittor(device="cpu")
        self.config = config
        self.parameters = parameters
        self.store = store
        self.recompute = recompute
        self._frozen = FrozenProducts(store) if frozen is None and store is not None else frozen
        self._sincos = self._jt.array(rotary_table(config)).stop_grad()
        self._starts: Var = None
        self._shared = 0
        self.on_layer: Callable[[int], None] | None = None

    def begin(self, batch: Batch) -> None:
        """Take up a batch.

        Raises:
            ShapeError: a sequence starts elsewhere, or is torn apart.
        """
        starts = np.flatnonzero(np.diff(batch.slots, prepend=-1)).astype(np.int32)
        ends = np.append(starts, np.int32(batch.size))
        lengths = np.diff(ends)
        firsts = batch.positions[starts]
        shared = int(firsts.max())
        whole = np.array_equal(batch.positions, np.arange(batch.size) - np.repeat(starts - firsts, lengths))
        goes_on = not shared or (shared == lengths[0] and not firsts[0] and (firsts[1:] == shared).all())
        if not (whole and goes_on) or len(np.unique(batch.slots[starts])) != len(starts):
            raise ShapeError(
                "training takes whole sequences one after the other, from position 0 on, or all from the end of the first on."
            )
        if (firsts + lengths).max() > self.config.n_positions:
            raise ShapeError(
                f"a sequence has {(firsts + lengths).max()} tokens, more than n_positions {self.config.n_positions}."
            )
        self._shared = shared
        if self._frozen is not None:
            self._frozen.begin_pass()
        self._starts = self._jt.array(ends)

    def block(self, name: str, compute: Callable[[Var], Var], x: Var) -> Var:
        """A block of the network."""
        if not self.recompute or self._jt.flags.no_grad:
            return compute(x)
        return self._recomputed(compute, x, [key for key in self.parameters if key.startswith(f"{name}.")])

    def _recomputed(self, compute: Callable[[Var], Var], x: Var, names: list[str]) -> Var:
        """A block that is computed again when its gradients are asked for: only `x` is kept.

        Source: Chen et al. 2016, arXiv:1604.06174.
        """
        jt = self._jt
        trained = [self.parameters[name] for name in names if not self.parameters[name].is_stop_grad()]

        def forward(x: Var, *_: Var) -> tuple[Var, Any]:
            with jt.no_grad():
                y = compute(x)
                y.sync()
            return y.start_grad(), x

        def backward(x: Var, dy: Var) -> tuple[Any, ...]:
            again = x.detach().start_grad()
            loss = (compute(again) * dy.detach()).sum()
            gradients = jt.grad(loss, [again, *trained])
            jt.sync(gradients)
            return tuple(gradients)

        return nodes.node(forward, backward, x, *trained)

    def layer_done(self, layer: int) -> None:
        """Say that a block is through."""
        if self.on_layer is not None:
            self.on_layer(layer)

    def embed(self, ids: npt.NDArray[np.int32], name: str) -> Var:
        """Rows of the embedding: (N,) ids to (N, C), N all tokens of the batch."""
        if name in self.parameters or self.store is None:
            return nodes.take_rows(self._parameter(name), ids)
        return self._constant(self.store.rows(name, ids))

    def hidden(self, values: Var) -> Var:
        """Hidden states (N, C) of the layer before."""
        return values

    def layer_norm(self, x: Var, name: str) -> Var:
        """Normalise each token."""
        weight, bias = self._parameter(name + ".weight"), self._parameter(name + ".bias")
        return nodes.layer_norm(x, weight, bias, self.config.layer_norm_epsilon)

    def linear(self, x: Var, weight: Linear, into: str) -> Var:
        """(N, K) to (N, M), `Unbiased` where there is a bias; `into` has no meaning here."""
        y = self._times(x, weight.name + ".weight")
        if weight.low_rank is not None:
            a, b = weight.low_rank
            y = y + self._times(self._times(x, a), b) * weight.low_rank_scale
        return Unbiased(y, self._parameter(weight.name + ".bias")) if weight.bias else y

    def attention(self, qkv: Var, layer: int) -> Var:
        """Causal attention within each sequence: (N, 3C) to (N, C)."""
        return nodes.attention(qkv, self._starts, self._sincos, self.config, shared=self._shared)

    def gelu(self, x: Var, name: str) -> Var:
        """gelu_new."""
        return nodes.gelu(x.product, x.bias)

    def residual(self, x: Var, attn: Var, mlp: Var, name: str) -> Var:
        """x + attn + mlp."""
        return nodes.add_all(x, attn, mlp.product, mlp.bias)

    def logits(self, x: Var, norm: str, head: Linear, wanted: npt.NDArray[np.int32]) -> Var:
        """Final norm and head of the chosen tokens: (R, V)."""
        found = self.linear(self.layer_norm(self._chosen(x, wanted), norm), head, "logits")
        return nodes.add_bias(found.product, found.bias)

    def _chosen(self, x: Var, wanted: npt.NDArray[np.int32]) -> Var:
        """Rows of some tokens."""
        return x if len(wanted) == x.shape[0] else nodes.take_rows(x, wanted)

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
            return nodes.linear(x, self._parameter(name))
        return frozen_node(self._frozen, x, name)


@dataclass
class Score:
    """What the loss of a pass was made of.

    Attributes:
        loss: the sum over the tokens, weighted.
        right: tokens that had the largest logit.
        total: tokens that counted.
    """

    loss: float = 0.0
    right: int = 0
    total: int = 0


class LossOps(GradientOps):
    """The same, ending in the loss: the logits of few tokens are in memory at a time.

    `labels` and `weights` say what the wanted tokens of the next pass are followed by, and what each counts;
    `score` is what came of it. The result of `logits` is the loss, and only it may be differentiated.
    """

    labels: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    score: Score

    def logits(self, x: Var, norm: str, head: Linear, wanted: npt.NDArray[np.int32]) -> Var:
        """The weighted cross-entropy of the chosen tokens, a Var of one number."""
        normed = self.layer_norm(self._chosen(x, wanted), norm)
        inputs = [normed, self._parameter(f"{head.name}.bias")]
        if f"{head.name}.weight" in self.parameters:
            inputs.append(self.parameters[f"{head.name}.weight"])
        return nodes.node(self._loss, self._loss_back, *inputs)

    def _loss(self, x: Var, bias: Var, *matrix: Var) -> tuple[Var, Any]:
        """Loss and, since it is the end, gradients at once, some rows at a time."""
        jt, rows = self._jt, x.shape[0]
        step = max(32, CHUNK_NUMBERS // self.config.vocab_size)
        self.score = Score(total=rows)
        dx: list[Var] = []
        dbias = dweight = None
        with jt.no_grad():
            for first in range(0, rows, step):
                part = x if step >= rows else x[first : first + step]
                labels, weights = self.labels[first : first + step], self.weights[first : first + step]
                logits = self._head(part, *matrix)
                gradient, loss, right = nodes.cross_entropy(logits, bias, labels, weights)
                dx.append(self._head_back(gradient, *matrix))
                if not bias.is_stop_grad():
                    dbias = _plus(dbias, nodes.sum_rows(gradient))
                if matrix and not matrix[0].is_stop_grad():
                    dweight = _plus(dweight, nodes.multiply(gradient, part, turn_a=True))
                jt.sync([var for var in (dx[-1], loss, right, dbias, dweight) if var is not None])
                self.score.loss += float(np.dot(loss.numpy().astype(np.float64), weights))
                self.score.right += int(right.numpy().sum())
        gradients = (jt.concat(dx, dim=0) if len(dx) > 1 else dx[0], dbias, *([dweight] if matrix else []))
        return jt.array(np.array([self.score.loss], np.float32)), gradients

    def _loss_back(self, gradients: tuple[Any, ...], _: Var) -> tuple[Any, ...]:
        return gradients

    def _head(self, x: Var, *matrix: Var) -> Var:
        if matrix:
            return nodes.multiply(x, matrix[0], turn_b=True)
        assert self._frozen is not None, "the head is a parameter or in the store"
        return self._jt.array(self._frozen.multiply(x.numpy(), "lm_head.weight"))

    def _head_back(self, gradient: Var, *matrix: Var) -> Var:
        if matrix:
            return nodes.multiply(gradient, matrix[0])
        assert self._frozen is not None, "the head is a parameter or in the store"
        return self._jt.array(self._frozen.multiply_transposed(gradient.numpy(), "lm_head.weight"))


def _plus(sum_so_far: Var | None, more: Var) -> Var:
    return more if sum_so_far is None else sum_so_far + more
