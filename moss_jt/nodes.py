"""The steps of training as nodes of Jittor's graph, each with its own backward in C++ (kernels/cpu/training*.h).

Jittor's own elementwise operations run on one thread and its batched products are slow on a CPU; here every step
between two large products is one kernel over all tokens, on all threads. Large products go to oneDNN where it is.
A node is a pair of functions: forward gives the result and what backward needs; backward gives the gradients.
Activations are float32 Vars, (T, width).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt import startup
from moss_jt.config import MossConfig
from moss_jt.launch import training_in_place, training_node

Var = Any
Forward = Callable[..., tuple[Var, Any]]  # (inputs) to (result, what is kept)
Backward = Callable[..., tuple[Any, ...]]  # (kept, gradient of the result) to the gradients of the inputs

_SIZES = "const int64_t tokens = in0_shape0, width = in0_shape1;"
_LAYER_NORM = _SIZES + 'moss_training::layer_norm(in0_p, in1_p, in2_p, out0_p, out1_p, tokens, width, data["eps"]);'
_LAYER_NORM_BACK = (
    _SIZES + "moss_training::layer_norm_back(in0_p, in1_p, in2_p, in3_p, out0_p, out1_p, out2_p, tokens, width);"
)
_GELU = _SIZES + "moss_training::gelu(in0_p, in1_p, out0_p, tokens, width);"
_GELU_BACK = _SIZES + "moss_training::gelu_back(in0_p, in1_p, in2_p, out0_p, out1_p, tokens, width);"
_ADD_ALL = _SIZES + "moss_training::add_all(in0_p, in1_p, in2_p, in3_p, out0_p, tokens, width);"
_ADD_BIAS = _SIZES + "moss_training::add_bias(in0_p, in1_p, out0_p, tokens, width);"
_SUM_ROWS = _SIZES + "moss_training::sum_rows(in0_p, out0_p, tokens, width);"
_TURN_AROUND = _SIZES + "moss_training::turn_around(in0_p, out0_p, tokens, width);"
_TAKE_ROWS = "moss_training::take_rows(in0_p, in1_p, out0_p, in1_shape0, in0_shape1);"
_TAKE_ROWS_BACK = _SIZES + "moss_training::take_rows_back(in0_p, in1_p, out0_p, tokens, width, out0_shape0);"
_HEADS = 'const moss_training::Heads s{(int64_t)data["heads"], (int64_t)data["width"], (int64_t)data["rotary"]};'
_ATTEND = (
    _HEADS
    + """
    const moss_training::Sequences all{in1_p, in1_shape0 - 1, (int64_t)data["shared"]};
    moss_training::attend(s, all, in0_p, in2_p, out0_p, out1_p);
"""
)
_ATTEND_BACK = (
    _HEADS
    + """
    const moss_training::Sequences all{in4_p, in4_shape0 - 1, (int64_t)data["shared"]};
    moss_training::attend_back(s, all, {in0_p, in1_p, in2_p, in3_p, in5_p, out0_p});
"""
)
_CROSS_ENTROPY = """
    moss_training::cross_entropy(out0_p, in0_p, in1_p, in2_p, out1_p, out2_p, out0_shape0, out0_shape1);
"""


@cache
def _node_class() -> Any:
    """The kind of node: a class of Jittor's, and Jittor is there only once it was started."""
    jt = startup.import_jittor(device="cpu")

    class Node(jt.Function):  # type: ignore[misc, name-defined]
        """A step that knows its gradients."""

        def __init__(self, forward: Forward, backward: Backward) -> None:
            super().__init__()
            self.forward, self.backward = forward, backward

        def execute(self, *inputs: Var) -> Var:
            result, self.kept = self.forward(*inputs)
            return result

        def grad(self, gradient: Var) -> tuple[Any, ...]:
            return self.backward(self.kept, gradient)

    return Node


def node(forward: Forward, backward: Backward, *inputs: Var) -> Var:
    """Put a step into the graph."""
    return _node_class()(forward, backward)(*inputs)


def multiply(a: Var, b: Var, turn_a: bool = False, turn_b: bool = False) -> Var:
    """The product of two matrices, each taken as it lies or turned around; no gradients."""
    jt = startup.import_jittor(device="cpu")
    if turn_a and not turn_b and b.shape[1] < a.shape[1]:  # the narrower one is turned, and the result back
        return _turned(multiply(b, a, turn_a=True))
    if turn_a:  # by ourselves: oneDNN takes more than twice as long for a product with a matrix turned around
        a = _turned(a)
    if jt.mkl_ops is not None:
        return jt.mkl_ops.mkl_matmul(a, b, False, turn_b)
    return jt.nn.matmul_transpose(a, b) if turn_b else jt.matmul(a, b)


def _turned(x: Var) -> Var:
    return training_node(_TURN_AROUND, [[x.shape[1], x.shape[0]]], [x])[0]


def linear(x: Var, weight: Var) -> Var:
    """x W^T: (T, K) and (N, K) to (T, N)."""

    def forward(x: Var, weight: Var) -> tuple[Var, Any]:
        wanted = not x.is_stop_grad(), not weight.is_stop_grad()  # in backward all Vars say that they stop
        return multiply(x, weight, turn_b=True), (x, weight, wanted)

    def backward(kept: Any, dy: Var) -> tuple[Any, ...]:
        x, weight, wanted = kept
        return (
            multiply(dy, weight) if wanted[0] else None,
            multiply(dy, x, turn_a=True) if wanted[1] else None,
        )

    return node(forward, backward, x, weight)


def layer_norm(x: Var, weight: Var, bias: Var, eps: float) -> Var:
    """Normalise each token."""

    def forward(x: Var, weight: Var, bias: Var) -> tuple[Var, Any]:
        y, kept = training_node(_LAYER_NORM, [x.shape, [x.shape[0], 2]], [x, weight, bias], {"eps": eps})
        return y, (x, weight, kept)

    def backward(kept: Any, dy: Var) -> tuple[Any, ...]:
        x, weight, factors = kept
        return tuple(training_node(_LAYER_NORM_BACK, [x.shape, weight.shape, weight.shape], [dy, x, weight, factors]))

    return node(forward, backward, x, weight, bias)


def gelu(x: Var, bias: Var) -> Var:
    """gelu_new(x + bias)."""

    def forward(x: Var, bias: Var) -> tuple[Var, Any]:
        return training_node(_GELU, [x.shape], [x, bias])[0], (x, bias)

    def backward(kept: Any, dy: Var) -> tuple[Any, ...]:
        x, bias = kept
        return tuple(training_node(_GELU_BACK, [x.shape, bias.shape], [dy, x, bias]))

    return node(forward, backward, x, bias)


def add_all(x: Var, a: Var, b: Var, bias: Var) -> Var:
    """x + a + b + bias."""

    def forward(x: Var, a: Var, b: Var, bias: Var) -> tuple[Var, Any]:
        return training_node(_ADD_ALL, [x.shape], [x, a, b, bias])[0], not bias.is_stop_grad()

    def backward(wanted: Any, dy: Var) -> tuple[Any, ...]:
        return dy, dy, dy, sum_rows(dy) if wanted else None

    return node(forward, backward, x, a, b, bias)


def add_bias(x: Var, bias: Var) -> Var:
    """x + bias."""

    def forward(x: Var, bias: Var) -> tuple[Var, Any]:
        return training_node(_ADD_BIAS, [x.shape], [x, bias])[0], not bias.is_stop_grad()

    def backward(wanted: Any, dy: Var) -> tuple[Any, ...]:
        return dy, sum_rows(dy) if wanted else None

    return node(forward, backward, x, bias)


def take_rows(table: Var, ids: npt.NDArray[np.int32]) -> Var:
    """Rows of an embedding, (T, C)."""
    which = _whole_numbers(ids)

    def forward(table: Var) -> tuple[Var, Any]:
        return training_node(_TAKE_ROWS, [[len(ids), table.shape[1]]], [table, which])[0], table.shape

    def backward(shape: Any, dy: Var) -> tuple[Any, ...]:
        return tuple(training_node(_TAKE_ROWS_BACK, [shape], [dy, which]))

    return node(forward, backward, table)


def attention(qkv: Var, starts: Var, sincos: Var, config: MossConfig, *, shared: int = 0) -> Var:
    """Causal attention within each sequence: (T, 3C) to (T, C).

    Args:
        qkv: in the checkpoint's order.
        starts: where each sequence begins, and T, int32.
        sincos: of all positions, as `moss_jt.ops.rotary_table`.
        config: the model's shape.
        shared: length of the first sequence, where all others go on after it; else 0.
    """
    data = {"heads": config.n_head, "width": config.head_dim, "rotary": config.rotary_dim, "shared": shared}

    def forward(qkv: Var) -> tuple[Var, Any]:
        tokens = qkv.shape[0]
        shapes = [[tokens, config.n_embd], [config.n_head, tokens]]
        out, logsum = training_node(_ATTEND, shapes, [qkv, starts, sincos], data)
        return out, (qkv, out, logsum)

    def backward(kept: Any, dy: Var) -> tuple[Any, ...]:
        qkv, out, logsum = kept
        return tuple(training_node(_ATTEND_BACK, [qkv.shape], [dy, qkv, out, logsum, starts, sincos], data))

    return node(forward, backward, qkv)


def cross_entropy(
    logits: Var, bias: Var, labels: npt.NDArray[np.int32], weights: npt.NDArray[np.float32]
) -> tuple[Var, Var, Var]:
    """Loss of rows of logits, and their gradient in the logits' own memory; no node.

    Args:
        logits: (R, V), without the bias; whoever holds them finds the gradient there.
        bias: (V,).
        labels: (R,).
        weights: (R,) of each row in the gradient.

    Returns:
        gradient by logits (R, V), loss (R,) not weighted, and 1 (R,) where the label has the largest logit.
    """
    jt = startup.import_jittor(device="cpu")
    loss, right = jt.empty([len(labels)], "float32"), jt.empty([len(labels)], "float32")
    inputs = [bias, _whole_numbers(labels), jt.array(weights)]
    gradient, loss, right = training_in_place(_CROSS_ENTROPY, inputs, [logits, loss, right], {})
    return gradient, loss, right


def sum_rows(x: Var) -> Var:
    """The sum of all rows, (width,); no node."""
    return training_node(_SUM_ROWS, [[x.shape[1]]], [x])[0]


def _whole_numbers(values: npt.NDArray[np.int32]) -> Var:
    jt = startup.import_jittor(device="cpu")
    return jt.array(np.ascontiguousarray(values, np.int32))
