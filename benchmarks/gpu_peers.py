"""Part of gpu.py: int4 products of others on the same device, in turns with ours.

torch's own kernel for groups of int4 (bfloat16 inputs), and a Triton kernel of our making that works as GPTQ's usual
ones do: it unpacks codes, scales them to float16 and multiplies by tensor cores, for any number of tokens.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from gpu_rows import Rows

from moss_jt.device import Device
from moss_jt.layout import TileLayout
from moss_jt.ops import ROUND_BLOCK
from moss_jt.record import spread

Results = dict[str, Any]
Work = Callable[[], Any]

SHAPES = {"qkv": (18432, 6144), "out": (6144, 6144), "fc_in": (24576, 6144), "fc_out": (6144, 24576)}
TOKENS = (1, 16)
GROUP, PAIRS, PAST_CACHES = 128, 9, 512 << 20


def products(open_device: Callable[[], Device]) -> Results:
    """Seconds of a product by each, and how many times ours is faster; medians of pairs."""
    if importlib.util.find_spec("torch") is None:
        return {"not_measured": "torch is not installed"}
    results: Results = Rows()
    for name, shape in SHAPES.items():
        for tokens in TOKENS:
            device = open_device()
            ours = Ours(device, shape, tokens)
            row: Results = {}
            for peer, make in (("torch", torch_int4), ("triton", triton_gptq)):
                if peer == "triton" and importlib.util.find_spec("triton") is None:
                    row[peer] = "not measured: triton is not installed"
                    continue
                theirs, off = make(shape, tokens)
                graph = _captured(theirs)
                pairs = [(ours.seconds(), _seconds_of(graph) / len(theirs)) for _ in range(PAIRS + 1)][1:]
                row[f"{peer}_us"] = spread([1e6 * pair[1] for pair in pairs], 1)
                row[f"times_{peer}"] = spread([theirs_s / ours_s for ours_s, theirs_s in pairs], 2)
                row["ours_us"] = spread([1e6 * pair[0] for pair in pairs], 1)
                row[f"{peer}_off"] = off
            results[f"{name} {tokens}"] = row
            device.close()
    return results


class Ours:
    """Our int4 product, inputs rounded to half, over copies of a matrix that no cache holds all of."""

    def __init__(self, device: Device, shape: tuple[int, int], tokens: int) -> None:
        layout = TileLayout(shape, 4, GROUP)
        nbytes, blocks = layout.n_tiles * layout.tile_bytes, layout.padded_in // ROUND_BLOCK
        self._device, self._nbytes, self._copies = device, nbytes, -(-PAST_CACHES // nbytes)
        self._blob = device.allocate(self._copies * nbytes, "measuring")
        some = np.random.default_rng(0).integers(0, 0x38, nbytes, np.uint8)  # below 0x3800: finite scales
        for copy in range(self._copies):
            device.write(self._blob.after(copy * nbytes), some)
        x = device.allocate(4 * tokens * shape[1], "measuring")
        device.write(x, np.random.default_rng(1).standard_normal(tokens * shape[1]).astype(np.float32))
        codes = device.allocate(2 * tokens * layout.padded_in, "measuring")
        steps, sums = (device.allocate(4 * tokens * blocks, "measuring") for _ in range(2))
        y = device.allocate(4 * tokens * shape[0], "measuring")
        self._rounding = (x, None, codes, steps, sums, tokens, shape[1], layout.padded_in, GROUP, ROUND_BLOCK, 0, 0)
        where = (layout.tile_bytes, layout.code_bytes, layout.code_bytes + layout.scale_bytes, layout.padded_in, GROUP)
        self._rest = (codes, steps, sums, None, y, tokens, shape[0], 0, *where, ROUND_BLOCK, shape[0], 0)
        self._grids = ((-(-blocks // 8), tokens), (layout.n_tiles,))
        self._kernel = f"halves_int4_{8 if tokens <= 8 else 16}"
        self._graph = device.capture(self._launch)

    def _launch(self) -> None:
        for copy in range(self._copies):
            self._device.launch("rounding", "halve_activations", self._grids[0], 256, self._rounding)
            place = self._blob.after(copy * self._nbytes)
            self._device.launch("linear_rounded", self._kernel, self._grids[1], 256, (place, *self._rest))

    def seconds(self) -> float:
        """Of one product, rounding its inputs included, since the others take halves as they are."""
        device = self._device
        device.wait(device.record("compute"))
        began = time.perf_counter()
        device.replay(self._graph)
        device.wait(device.record("compute"))
        return (time.perf_counter() - began) / self._copies


def _captured(work: list[Work]) -> Any:
    """Calls as one graph of theirs, since ours are one, and Python would call them too slowly."""
    import torch

    for each in work:  # tunes itself
        each()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in work:
            each()
    return graph


def _seconds_of(graph: Any) -> float:
    """Of all its calls."""
    import torch

    torch.cuda.synchronize()
    began = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def _matrix(shape: tuple[int, int]) -> tuple[Any, Any, Any]:
    """Codes (N, K) of 0 to 15, scales and zeros (N, K / GROUP), on the device."""
    import torch

    n, k = shape
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    scales = torch.rand(n, k // GROUP, device="cuda") * 0.01 + 0.005
    zeros = torch.randint(6, 10, (n, k // GROUP), dtype=torch.uint8, device="cuda")
    return codes, scales, zeros


def _expected(x: Any, codes: Any, scales: Any, zeros: Any) -> Any:
    """The product in float32."""
    wide = (codes.float() - zeros.float().repeat_interleave(GROUP, 1)) * scales.repeat_interleave(GROUP, 1)
    return x.float() @ wide.T


def torch_int4(shape: tuple[int, int], tokens: int) -> tuple[list[Work], float]:
    """torch's kernel over several copies, and its largest relative error."""
    import torch

    codes, scales, zeros = _matrix(shape)
    x = torch.randn(tokens, shape[1], dtype=torch.bfloat16, device="cuda")
    packed = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
    weight = torch.ops.aten._convert_weight_to_int4pack(packed, 8)
    # torch multiplies (code - 8) and adds its "zero"
    shift = (8.0 - zeros.float()) * scales
    both = torch.stack([scales, shift], -1).transpose(0, 1).contiguous().to(torch.bfloat16)  # (K / GROUP, N, 2)
    copies = [weight.clone() for _ in range(-(-PAST_CACHES // weight.numel() // 4) or 1)]
    work: list[Work] = [partial(torch.ops.aten._weight_int4pack_mm, x, each, GROUP, both) for each in copies]
    want = _expected(x, codes, scales, zeros)
    return work, float((work[0]().float() - want).abs().max() / want.abs().max())


def triton_gptq(shape: tuple[int, int], tokens: int) -> tuple[list[Work], float]:
    """The Triton kernel over several copies, and its largest relative error."""
    import torch
    from peers.triton_gptq import multiply, pack

    codes, scales, zeros = _matrix(shape)
    x = torch.randn(tokens, shape[1], dtype=torch.float16, device="cuda")
    qweight, halves, qzeros = pack(codes, scales, zeros)
    copies = [qweight.clone() for _ in range(-(-PAST_CACHES // (4 * qweight.numel())) or 1)]
    work: list[Work] = [partial(multiply, x, each, halves, qzeros, GROUP) for each in copies]
    want = _expected(x, codes, scales, zeros)
    return work, float((work[0]().float() - want).abs().max() / want.abs().max())
