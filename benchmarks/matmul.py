"""Products with int4 and int8 matrices and rounded activations, beside what the machine can do.

    python benchmarks/matmul.py [--bits 4 8] [--tokens 1 4 16 128 512] [--shapes qkv out fc_in fc_out head] [--save]

The shapes are those of moss-moon-003. Few tokens: bytes of weights per second against pure reading of memory; many:
operations per second against 8-bit products in registers. Each run stands between two measurements of its limit and
goes through copies of the matrix that no cache holds; the ratio is to the limits' mean, once by the clock and once by
processor time, which other programs on the machine disturb less. One JSON line comes last; exit code 1 where a median
misses what is asked: 0.9 of memory for one token, 0.6 of the operations for 128 and more.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
from rows import huge_pages, in_turns

from moss_jt.config import Bits
from moss_jt.launch import LINEAR_ROUNDED, ROUND_ACTIVATIONS, Buffer, aligned, computing, run, warm_up
from moss_jt.layout import TileLayout
from moss_jt.limits import Limits
from moss_jt.ops import PROCESSORS, ROUND_BLOCK, layout_data
from moss_jt.record import keep, spread

SHAPES = {  # (N, K) of moss-moon-003
    "qkv": (18432, 6144),
    "out": (6144, 6144),
    "fc_in": (24576, 6144),
    "fc_out": (6144, 24576),
    "head": (107008, 6144),
}
GROUP = 128
PAST_CACHES = 400 << 20  # bytes of weights that a run goes through
MANY = 64  # tokens from which operations are what takes time
ASKED_OF_MEMORY, ASKED_OF_OPERATIONS = 0.9, 0.6


class Copies:
    """Random bytes as copies of a stored matrix, and rounded inputs for some tokens."""

    def __init__(self, shape: tuple[int, int], bits: Bits, tokens: int, processor: str) -> None:
        self.layout, self.tokens = TileLayout(shape, bits, GROUP), tokens
        n, k = shape
        self.count = 1 if tokens >= MANY else -(-PAST_CACHES // self.layout.nbytes)
        self.blob = Buffer(huge_pages(self.count * self.layout.nbytes))
        some = np.random.default_rng(0).integers(0, 0x38, 1 << 20, np.uint8)  # below 0x3800: finite scales
        for start in range(0, self.blob.array.size, some.size):
            part = self.blob.array[start : start + some.size]
            part[:] = some[: part.size]
        self.x = Buffer(np.random.default_rng(1).normal(size=(tokens, k)).astype(np.float32))
        self.y = Buffer(aligned((tokens, n), "float32"))
        self.rounded = [
            Buffer(aligned((tokens * size,), kind))
            for size, kind in ((k, "int8"), (k // ROUND_BLOCK, "float32"), (k // ROUND_BLOCK, "int32"))
        ]
        self.unused = Buffer(aligned((2,), "int32"))
        sizes = {"tokens": tokens, "first": 0, "out": n, "x_stride": k, "y_stride": n, "block": ROUND_BLOCK}
        flags = {"has_bias": False, "add": False, "permuted": False, "processor": PROCESSORS[processor]}
        self.data = layout_data(self.layout) | sizes | flags

    @property
    def nbytes(self) -> int:
        """Bytes of weights in one run."""
        return self.count * self.layout.nbytes

    @property
    def operations(self) -> float:
        """A multiplication and an addition for each weight and token of one run."""
        return 2.0 * self.count * self.layout.shape[0] * self.layout.shape[1] * self.tokens

    def multiply(self) -> None:
        """Round the inputs and multiply, once with every copy."""
        codes, steps, sums = (buffer.var for buffer in self.rounded)
        for copy in range(self.count):
            run(ROUND_ACTIVATIONS, [self.x.var, self.unused.var], [codes, steps, sums], self.data)
            where = {"blob_at": copy * self.layout.nbytes}
            run(LINEAR_ROUNDED, [codes, self.blob.var, self.x.var, steps, sums], [self.y.var], self.data | where)


def measure(name: str, bits: Bits, tokens: int, limits: Limits, options: argparse.Namespace) -> dict[str, Any]:
    """One shape at one number of tokens."""
    copies = Copies(SHAPES[name], bits, tokens, options.processor)
    if tokens >= MANY:
        rates = in_turns(copies.multiply, copies.operations, limits.int8, options.pairs)
        return rates.summary("gop_per_s")
    rates = in_turns(copies.multiply, copies.nbytes, lambda: limits.memory(0.1), options.pairs)
    return rates.summary("gb_per_s") | {"ms": spread([copies.layout.nbytes / rate * 1e3 for rate in rates.per_second])}


def missed(found: dict[str, dict[str, Any]]) -> list[str]:
    """What was asked and not reached, in words."""
    words = []
    for case, rates in found.items():
        tokens = int(case.split()[-1])
        asked = ASKED_OF_OPERATIONS if tokens >= MANY else ASKED_OF_MEMORY if tokens == 1 else 0.0
        if rates["of_limit"]["median"] < asked:
            words.append(f"{case}: {rates['of_limit']['median']} of the limit, {asked} was asked")
    return words


def main() -> int:
    """Measure, print each case, then the line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", choices=[4, 8], default=[4, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 128, 512])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qkv", "fc_out", "head"])
    parser.add_argument("--processor", choices=PROCESSORS, default="best", help="another version of the kernels")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--save", action="store_true", help="keep the line under benchmarks/results/")
    options = parser.parse_args()
    warm_up()
    found: dict[str, dict[str, Any]] = {}
    with computing(), Limits() as limits:
        for bits in options.bits:
            for name in options.shapes:
                for tokens in options.tokens:
                    if name == "head" and (bits == 4 or tokens >= MANY):
                        continue  # the head is int8, and only one token of a prompt goes through it
                    case = f"int{bits} {name} {tokens}"
                    found[case] = measure(name, bits, tokens, limits, options)
                    print(case, found[case], flush=True)
    results = {"processor": options.processor, "missed": missed(found), **found}
    print(keep("matmul", results, save=options.save))
    return int(bool(results["missed"]))


if __name__ == "__main__":
    sys.exit(main())
