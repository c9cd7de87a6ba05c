"""An int4 product in Triton over GPTQ's usual arrays: what a runtime without kernels of its own would use.

    qweight (K / 8, N) int32    eight codes of one output, the lowest four bits first
    scales  (K / G, N) float16
    qzeros  (K / G, N / 8) int32

A program takes a tile of outputs, walks over the inputs, unpacks codes to float16 and multiplies by tensor cores.
"""

# ruff: noqa: ANN001, ANN202  (Triton reads the annotations of a kernel as code of its own)

from typing import Any

import torch
import triton
import triton.language as tl

_SHIFTS = tuple(range(0, 32, 4))


def pack(codes: Any, scales: Any, zeros: Any) -> tuple[Any, Any, Any]:
    """Codes (N, K), scales and zeros (N, K / G) to the arrays above."""
    shifts = torch.tensor(_SHIFTS, device=codes.device, dtype=torch.int64)

    def packed(values: Any) -> Any:  # (..., 8) to (...,)
        words = (values.to(torch.int64) << shifts).sum(-1)
        return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)

    n, k = codes.shape
    qweight = packed(codes.T.reshape(k // 8, 8, n).transpose(1, 2)).contiguous()
    qzeros = packed(zeros.T.reshape(-1, n // 8, 8)).contiguous()
    return qweight, scales.T.contiguous().to(torch.float16), qzeros


_TILES = [
    triton.Config({"OUTPUTS": outputs, "INPUTS": inputs}, num_warps=warps, num_stages=stages)
    for outputs in (32, 64, 128)
    for inputs in (64, 128)
    for warps, stages in ((4, 3), (4, 4), (8, 3))
]


@triton.autotune(configs=_TILES, key=["tokens", "n", "k"])  # type: ignore[untyped-decorator]
@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]  # noqa: PLR0917
    x,
    qweight,
    scales,
    qzeros,
    y,
    tokens,
    n,
    k,
    group,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    columns = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for start in range(0, k, INPUTS):
        inputs = start + tl.arange(0, INPUTS)
        values = tl.load(x + rows[:, None] * k + inputs[None, :], mask=rows[:, None] < tokens, other=0.0)
        words = tl.load(qweight + (inputs[:, None] // 8) * n + columns[None, :])
        codes = (words >> ((inputs[:, None] % 8) * 4)) & 15
        here = inputs[:, None] // group
        scale = tl.load(scales + here * n + columns[None, :])
        zero = tl.load(qzeros + here * (n // 8) + columns[None, :] // 8)
        zero = (zero >> ((columns[None, :] % 8) * 4)) & 15
        total += tl.dot(values, (codes - zero).to(tl.float16) * scale)
    place = y + rows[:, None] * n + columns[None, :]
    tl.store(place, total.to(tl.float16), mask=rows[:, None] < tokens)


def multiply(x: Any, qweight: Any, scales: Any, qzeros: Any, group: int) -> Any:
    """x (T, K) float16 times the matrix: (T, N) float16."""
    tokens, k = x.shape
    n = qweight.shape[1]
    y = torch.empty((tokens, n), dtype=torch.float16, device=x.device)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return n // meta["OUTPUTS"], -(-tokens // 16)

    launch: Any = _product
    launch[grid](x, qweight, scales, qzeros, y, tokens, n, k, group, TOKENS=16)
    return y
