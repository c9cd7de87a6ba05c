"""Seeing that a device computes what it should, before it is trusted with a model.

A driver that is broken or does not fit, a compiler with an error, a card that is overclocked: any of them may give
wrong numbers without a word. So a network of one layer is computed on the device, for a prompt, for a second one and for
single tokens after it, and compared with the formulas in numpy; what it would choose from at the end, with the logits it
gave. It takes a few megabytes and far less than a second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt import sampling
from moss_jt.batch import Batch, single_batch
from moss_jt.config import GenerationConfig, MossConfig, Quantization
from moss_jt.device import Device
from moss_jt.device_ops import DeviceOps
from moss_jt.errors import KernelError
from moss_jt.kernels import reference
from moss_jt.kv_layout import KVType
from moss_jt.layout import RowsLayout, TileLayout
from moss_jt.model import Moss
from moss_jt.packing import dequantize, input_order, plain_groups, unpack
from moss_jt.placement import TwoPlans, fill
from moss_jt.plan import make_plan, matrix_sizes
from moss_jt.shortlist import Shortlist, Wish
from moss_jt.synthetic import EMBEDDING, layouts_of, synthetic_store
from moss_jt.weights import WeightStore, widen
from moss_jt.workspace import Inputs, device_needs

Floats = npt.NDArray[np.float32]
Product = Callable[[npt.NDArray[Any], str], npt.NDArray[Any]]

ALLOWED: dict[Inputs, float] = {  # of the largest logit; inputs rounded to int8 may fall to the other side of a step
    "float32": 2e-3,
    "float16": 5e-3,
    "int8": 3e-2,
}
_CONFIG = MossConfig(
    vocab_size=320, n_positions=64, n_embd=256, n_layer=1, n_head=4, rotary_dim=32, dtype="float16", name="check"
)
_WIDE = 512  # so that keys in int8 are read eight bytes at a time, as those of MOSS are
_PASSES = (20, 12, 1, 1, 1, 1)  # tokens of each: products have kernels for more than 16, up to 16 and up to 8 of them,
# attention for more than 8 and up to 8; the fourth captures the launches of a block, the last two replay them


def check_device(device: Device) -> None:
    """Compute a small network on a device in every way there is, and compare.

    Raises:
        KernelError: it gives other numbers, or none; says which way of computing.
    """
    for bits in (4, 8, 16):
        check_way(device, bits, "float32")
        check_way(device, bits, "float16")
        if bits < 16:
            check_way(device, bits, "int8")


def check_way(device: Device, bits: int, inputs: Inputs) -> None:
    """The same for one way of computing.

    Args:
        device: what is to compute.
        bits: of the weights; 4, 8, or 16 for floating point.
        inputs: what products make of theirs.
    """
    config = replace(_CONFIG, n_embd=_WIDE) if inputs == "int8" else _CONFIG
    if bits < 16:
        quantization = Quantization(4 if bits == 4 else 8, 128)
        config = replace(config, quantization=quantization, head_quantization=quantization)
    store = synthetic_store(config, threads=1)
    ids = np.arange(sum(_PASSES), dtype=np.int32) * 7 % config.vocab_size
    found, shortlist = _computed(device, config, store, ids, inputs)
    want = _expected(config, store, ids, rounding=inputs == "int8")
    off = float(np.abs(found - want).max() / np.abs(want).max())
    told = f"{device.name} computes wrong: with {bits}-bit weights and inputs in {inputs}"
    if not off <= ALLOWED[inputs]:
        raise KernelError(
            f"{told} a small network is off by {off:.2g} of its largest logit. `moss-jt doctor` looks at driver and CUDA."
        )
    if not _holds_the_best(shortlist, found[-1], _wish(ids)):
        raise KernelError(f"{told} the best of its logits are not found. `moss-jt doctor` looks at driver and CUDA.")


def _wish(ids: npt.NDArray[np.int32]) -> Wish:
    return Wish(ids.tolist(), GenerationConfig(temperature=1.0, top_k=40, top_p=1.0, repetition_penalty=1.5))


def _allowed(vocabulary: int) -> npt.NDArray[np.bool_]:
    return np.arange(vocabulary) % 3 > 0


def _holds_the_best(shortlist: Shortlist, logits: Floats, wish: Wish) -> bool:
    """Whether the candidates are the best of what is allowed, with the scores that the processor would give them."""
    greedy = replace(wish.config, temperature=0.0)  # which narrows nothing
    want = sampling.process(logits, wish.history, greedy, allowed=_allowed(len(logits)))
    best = np.argsort(want)[-wish.wanted :]
    mass = float(np.exp(want - want.max()).sum())
    return (
        bool(np.isin(best, shortlist.ids).all())
        and bool(np.allclose(shortlist.scores, want[shortlist.ids], rtol=1e-5))
        and abs(shortlist.mass - mass) <= 1e-3 * mass
    )


def _computed(
    device: Device, config: MossConfig, store: WeightStore, ids: npt.NDArray[np.int32], inputs: Inputs
) -> tuple[Floats, Shortlist]:
    """Logits of a prompt, of what follows it, and of single tokens after that, on the device; what the last would
    be followed by."""
    kv: KVType = inputs  # so that each kind of keys and values has its turn
    layouts = {size.name: store.layout(size.name) for size in matrix_sizes(config, layouts_of(config))}
    sizes = matrix_sizes(config, layouts)
    needs = device_needs(config, sizes, layouts, base=device.own_bytes, kv=kv, margin=0)
    try:
        plan = make_plan(sizes, needs, memory=needs.fixed + 4 * sum(size.nbytes for size in sizes), context=64)
        space = fill(config, store, device, sizes, plans=TwoPlans(plan, None, {}), kv=kv).space
        cache = space.cache(slots=1, tokens=64)
        ops, network = DeviceOps(space, cache, inputs=inputs), Moss[Any](config)
        parts = []
        start = 0
        for count in _PASSES:
            cache.reserve(0, count)
            batch: Batch = single_batch(ids[start : start + count], start=start, wanted=np.arange(count))
            parts.append(network.execute(ops, batch))
            cache.commit(0, count)
            start += count
        ops.allow(_allowed(config.vocab_size))
        (shortlist,) = ops.shortlists(network.ln_f, network.lm_head, np.zeros(1, np.int32), [_wish(ids)])
        return np.concatenate(parts), shortlist
    finally:
        device.close()


def _expected(config: MossConfig, store: WeightStore, ids: Any, *, rounding: bool) -> npt.NDArray[Any]:
    """The same by the formulas."""

    def product(x: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
        layout, blob = store.layout(name), store.read(name)
        if isinstance(layout, RowsLayout):
            n, k = layout.shape
            return reference.linear(x, widen(blob[: n * layout.row_bytes], layout.dtype).reshape(n, k))
        assert isinstance(layout, TileLayout)
        matrix = unpack(blob, layout)
        if not rounding:
            return reference.linear(x, dequantize(matrix))
        order = input_order(layout, plain_groups(layout.shape[1], layout.group_size))
        return reference.linear_rounded(x.astype(np.float32), matrix, layout, order, 128)

    def norm(x: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
        weight, bias = (store.small(f"{name}.{kind}") for kind in ("weight", "bias"))
        return reference.layer_norm(x, weight, bias, config.layer_norm_epsilon)

    x = store.rows(EMBEDDING, ids).astype(np.float64)
    block = "transformer.h.0"
    h = norm(x, f"{block}.ln_1")
    positions, slots = np.arange(len(ids)), np.zeros(len(ids), int)
    qkv = product(h, f"{block}.attn.qkv_proj.weight")
    merged = reference.attention(qkv, config.n_head, config.rotary_dim, slots, positions)
    inner = product(h, f"{block}.mlp.fc_in.weight") + store.small(f"{block}.mlp.fc_in.bias")
    mlp = product(reference.gelu(inner), f"{block}.mlp.fc_out.weight") + store.small(f"{block}.mlp.fc_out.bias")
    x = x + product(merged, f"{block}.attn.out_proj.weight") + mlp
    head: npt.NDArray[Any] = product(norm(x, "transformer.ln_f"), "lm_head.weight") + store.small("lm_head.bias")
    return head
