"""Attention over the cache: bytes of keys and values per second when decoding, operations per second in a prompt.

    python benchmarks/attention.py [--kinds float16 int8 float32] [--contexts 64 512 2048] [--pairs 9] [--save]

The heads are those of moss-moon-003 (24 of 256 channels). A cache of 2,048 tokens in all is filled with random
numbers and read once over in a run: one sequence of 2,048, 32 of 64 one after the other, and so on, so that
no run finds its bytes in the processor's caches. Each run stands between two measurements of the read bandwidth
of memory; the ratio is to their mean, once by the clock and once by processor time, which other programs on the
machine disturb less. One JSON line comes last.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np

from moss_jt.batch import Batch
from moss_jt.cache import KVCache, KVType
from moss_jt.config import MossConfig
from moss_jt.launch import computing, warm_up
from moss_jt.limits import Limits
from moss_jt.ops import InferenceOps
from moss_jt.record import keep, spread
from moss_jt.weights import WeightStore

TOKENS = 2048  # cached in all
PROMPTS = (128, 512)  # new tokens of a pass at the end of TOKENS


@dataclass
class Rates:
    """Of the runs of one case, each beside the read bandwidth measured around it."""

    per_second: list[float] = field(default_factory=list)
    of_memory: list[float] = field(default_factory=list)
    of_memory_cpu: list[float] = field(default_factory=list)

    def summary(self, unit: str) -> dict[str, Any]:
        """For the line of results."""
        found: dict[str, Any] = {unit: spread([rate / 1e9 for rate in self.per_second], 2)}
        if self.of_memory:
            found |= {"of_memory": spread(self.of_memory), "of_memory_cpu": spread(self.of_memory_cpu)}
        return found


class Table:
    """A full cache of one kind, cut into sequences of one length."""

    def __init__(self, kind: KVType, context: int, layers: int) -> None:
        config = MossConfig(vocab_size=8, n_positions=TOKENS, n_embd=6144, n_layer=layers, n_head=24, rotary_dim=64)
        self.slots = TOKENS // context
        self.context, self.layers = context, range(layers)
        self.cache = KVCache(config, slots=self.slots, tokens=TOKENS, kind=kind)
        self.ops = InferenceOps(config, WeightStore(), self.cache, capacity=max(PROMPTS))
        for slot in range(self.slots):
            self.cache.reserve(slot, context)
            self.cache.commit(slot, context)
        self._fill(np.random.default_rng(0))
        self.ops.buffers["qkv"].array[:] = np.random.default_rng(1).normal(size=self.ops.buffers["qkv"].array.shape)
        self.kv_bytes = TOKENS * self.cache.token_bytes

    def _fill(self, rng: np.random.Generator) -> None:
        """Random keys and values, in every row of every layer."""
        layout = self.cache.layout
        for layer in self.layers:
            rows = self.cache.rows(layer)[: TOKENS // 32]
            numbers = rows[..., : layout.steps_at]
            if layout.steps:
                numbers[:] = rng.integers(0, 256, numbers.shape, np.uint8)
                rows[..., layout.steps_at :] = np.full(layout.steps, 0x3C00, np.uint16).view(np.uint8)  # 2^-7
            else:
                some = rng.normal(size=(*numbers.shape[1:4], layout.width)).astype(layout.kind)
                numbers[:] = some.view(np.uint8)

    def decode(self) -> float:
        """One token after each sequence's last but one, over all layers; bytes read."""
        for slot in range(self.slots):
            self._begin(1, slot)
            for layer in self.layers:
                self.ops.attention(self.ops.buffers["qkv"], layer)
        return self.kv_bytes

    def prompt(self, tokens: int) -> float:
        """The last tokens of the first sequence in one pass, over all layers; floating-point operations."""
        self._begin(tokens, 0)
        for layer in self.layers:
            self.ops.attention(self.ops.buffers["qkv"], layer)
        pairs = sum(range(self.context - tokens + 1, self.context + 1))
        return 4.0 * pairs * self.ops.config.n_embd * len(self.layers)

    def _begin(self, tokens: int, slot: int) -> None:
        positions = np.arange(self.context - tokens, self.context, dtype=np.int32)
        slots = np.full(tokens, slot, np.int32)
        self.ops.begin(Batch(np.zeros(tokens, np.int32), slots, positions, slots[:1]))


def timed(run: Callable[[], float]) -> tuple[float, float, float]:
    """What a run amounts to, its seconds, and those of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    with computing():
        amount = run()
    return amount, time.perf_counter() - wall, time.process_time() - cpu


def measure_decode(table: Table, limits: Limits, pairs: int) -> Rates:
    """Bytes of keys and values a second, against the bytes that memory gives."""
    rates = Rates()
    timed(table.decode)
    before = limits.memory(0.1)
    for _ in range(pairs):
        amount, wall, cpu = timed(table.decode)
        after = limits.memory(0.1)
        rates.per_second.append(amount / wall)
        rates.of_memory.append(2 * amount / wall / (before.per_second + after.per_second))
        rates.of_memory_cpu.append(2 * amount / cpu / (before.per_cpu_second + after.per_cpu_second))
        before = after
    return rates


def measure_prompt(table: Table, tokens: int, runs: int) -> Rates:
    """Operations a second of a pass."""
    rates = Rates()
    for _ in range(runs):
        amount, wall, _ = timed(lambda: table.prompt(tokens))
        rates.per_second.append(amount / wall)
    return rates


def measure(kind: KVType, options: argparse.Namespace, limits: Limits) -> dict[str, Any]:
    """All cases of one kind."""
    found: dict[str, Any] = {"decode": {}, "prompt": {}}
    for context in options.contexts:
        table = Table(kind, context, options.layers)
        found["decode"][context] = measure_decode(table, limits, options.pairs).summary("gb_per_s")
        print(f"{kind} decode at {context}: {found['decode'][context]}", flush=True)
        del table
    table = Table(kind, TOKENS, 2)
    for tokens in PROMPTS:
        found["prompt"][tokens] = measure_prompt(table, tokens, max(3, options.pairs // 3)).summary("gflop_per_s")
        print(f"{kind} prompt of {tokens} up to {TOKENS}: {found['prompt'][tokens]}", flush=True)
    return found


def main() -> int:
    """Measure, print, then the line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=get_args(KVType), default=["float16", "int8", "float32"])
    parser.add_argument(
        "--contexts", nargs="+", type=int, choices=(64, 128, 256, 512, 1024, 2048), default=[64, 512, 2048]
    )
    parser.add_argument("--layers", type=int, default=8, help="of the cache that is read, 50 MB each in float16")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--save", action="store_true", help="keep the line under benchmarks/results/")
    options = parser.parse_args()
    warm_up()
    with Limits() as limits:
        results = {kind: measure(kind, options, limits) for kind in options.kinds}
    print(keep("attention", {"layers": options.layers, **results}, save=options.save))
    return 0


if __name__ == "__main__":
    sys.exit(main())
