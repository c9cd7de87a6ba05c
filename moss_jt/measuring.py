"""How fast this machine computes with stored weights: small models of constant numbers, passed through the real steps.

Each model is larger than the processor's caches, so that weights come from memory as a real model's
do. Nothing is read from disk and nothing is kept.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt import sampling
from moss_jt.batch import single_batch
from moss_jt.cache import KVCache
from moss_jt.checkpoint import expected_shapes
from moss_jt.config import FloatType, GenerationConfig, MossConfig, Quantization
from moss_jt.kv_layout import KVType
from moss_jt.launch import computing
from moss_jt.layout import RowsLayout, TileLayout
from moss_jt.memory import MIB, available_memory
from moss_jt.model import Moss
from moss_jt.ops import InferenceOps
from moss_jt.packing import tile_layout
from moss_jt.pages import Pages
from moss_jt.predict import Spread
from moss_jt.weights import Stored, WeightStore

WIDTH, NARROW = 4096, 128
GROUP = 128
TOKENS = 128  # of a prefill pass
CONTEXT = 2048
_CACHES = 4  # the weights are this many times the caches
_LEAST_BYTES = 256 * MIB
_SECONDS = 0.4  # of each measurement
_FILL = 0x22  # small numbers in every format, none of them denormal


@dataclass(frozen=True)
class LayerRates:
    """What a format reaches.

    Attributes:
        decode: bytes of weights a second, one token.
        prefill: operations a second, TOKENS tokens.
        attention: bytes of cached keys and values a second, one token.
    """

    decode: Spread
    prefill: Spread
    attention: Spread


@dataclass(frozen=True)
class FixedTimes:
    """Seconds of a pass that no bytes account for."""

    layer_s: float
    token_s: float


def measure_layers(stored: str, kv: KVType, *, rounding: bool, fixed: FixedTimes) -> LayerRates:
    """Measure blocks whose matrices are stored in one format.

    Args:
        stored: "int4", "int8" or a type of floating point.
        kv: type of the cache.
        rounding: whether products with int4 and int8 round their inputs.
        fixed: what `measure_fixed` found.

    Raises:
        KernelError: the kernels cannot be compiled or fail.
    """
    bench = Bench(stored, kv, rounding=rounding)
    bench.step(0, 1)
    one = Spread.of(bench.times(_SECONDS, start=0, count=1))
    late = Spread.of(bench.times(_SECONDS, start=CONTEXT - 1, count=1))
    tokens = bench.tokens_within(2 * _SECONDS)
    many = Spread.of(bench.times(2 * _SECONDS, start=0, count=tokens))
    return bench.rates(one, late, many, tokens, fixed)


def measure_fixed(kv: KVType) -> FixedTimes:
    """Measure models so narrow that only the steps themselves take time, and the choice of a token."""
    seconds = {}
    for layers in (2, 18):
        bench = Bench("int4", kv, rounding=True, width=NARROW, layers=layers)
        bench.step(0, 1)
        seconds[layers] = statistics.median(bench.times(_SECONDS / 4, start=0, count=1))
    layer_s = max(0.0, (seconds[18] - seconds[2]) / 16)
    return FixedTimes(layer_s, max(0.0, seconds[2] - 2 * layer_s) + _choosing_s())


def _choosing_s() -> float:
    """Seconds of drawing a token from the vocabulary of the 16B model."""
    config, taken = GenerationConfig(seed=0), []
    logits = np.random.default_rng(0).standard_normal(MossConfig().vocab_size).astype(np.float32)
    for step in range(9):
        began = time.perf_counter()
        sampling.choose(sampling.process(logits, [1], config), config, sampling.step_rng(0, step))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


class Bench:
    """A model of constant numbers, larger than the caches, and passes over it.

    Args:
        stored, kv, rounding: as in `measure_layers`.
        width: of the model.
        layers: of the model; None for as many as no cache holds.
    """

    def __init__(
        self, stored: str, kv: KVType, *, rounding: bool, width: int | None = None, layers: int | None = None
    ) -> None:
        width = WIDTH if width is None else width
        config = _config(stored, width)
        per_layer = sum(layout.nbytes for layout in _layouts(config, stored).values())
        self.layers = _layer_count(per_layer) if layers is None else layers
        self.config = _config(stored, width, self.layers)
        layouts = _layouts(self.config, stored)
        self.nbytes = sum(layout.nbytes for name, layout in layouts.items() if name.startswith("transformer.h."))
        self.numbers = 12 * width * width * self.layers
        self.cache = KVCache(self.config, slots=1, tokens=CONTEXT, kind=kv)
        self.cache.reserve(0, CONTEXT)
        self.cache.memory.fill(_FILL)
        self._ops = InferenceOps(
            self.config, _store(self.config, layouts), self.cache, capacity=TOKENS, rounding=rounding
        )
        self._network: Moss[Any] = Moss(self.config)

    def step(self, start: int, count: int) -> float:
        """Seconds of a pass over `count` tokens after `start` others."""
        batch = single_batch(np.zeros(count, np.int32), start=start)
        began = time.perf_counter()
        with computing():
            self._network.execute(self._ops, batch)
        return time.perf_counter() - began

    def times(self, seconds: float, *, start: int, count: int) -> list[float]:
        """Seconds of each of several passes: three at least, more while the time lasts."""
        taken: list[float] = []
        while len(taken) < 3 or sum(taken) < seconds:
            taken.append(self.step(start, count))
        return taken

    def tokens_within(self, seconds: float) -> int:
        """Tokens of a pass that takes about so long at most: plain kernels are slow."""
        few = 16
        per_token = self.step(0, few) / few
        return max(few, min(TOKENS, int(seconds / per_token) // few * few))

    def rates(self, one: Spread, late: Spread, many: Spread, tokens: int, fixed: FixedTimes) -> LayerRates:
        """Rates from seconds: of a token, of one at the end of CONTEXT, and of a pass over `tokens`."""
        overhead = self.layers * fixed.layer_s + fixed.token_s
        cached = (CONTEXT - 1) * self.cache.token_bytes
        return LayerRates(
            decode=one.map(lambda seconds: self.nbytes / max(seconds - overhead, seconds / 2)),
            prefill=many.map(lambda seconds: 2 * self.numbers * tokens / max(seconds - overhead, seconds / 2)),
            attention=late.map(lambda seconds: cached / max(seconds - one.median, seconds / 100)),
        )


def _config(stored: str, width: int, layers: int = 1) -> MossConfig:
    bits = {"int4": 4, "int8": 8}.get(stored)
    return MossConfig(
        vocab_size=64,
        n_positions=CONTEXT,
        n_embd=width,
        n_layer=layers,
        n_head=max(4, width // 256),
        rotary_dim=16,
        quantization=None if bits is None else Quantization(4 if bits == 4 else 8, GROUP),
    )


def _layouts(config: MossConfig, stored: str) -> dict[str, RowsLayout | TileLayout]:
    layouts: dict[str, RowsLayout | TileLayout] = {}
    for name, shape in expected_shapes(config).items():
        if len(shape) == 2:
            layouts[name] = _layout(config, name, (shape[0], shape[1]), stored)
    return layouts


def _layout(config: MossConfig, name: str, shape: tuple[int, int], stored: str) -> RowsLayout | TileLayout:
    if config.quantization is not None and name.startswith("transformer.h."):
        return tile_layout(shape, config.quantization.bits, GROUP)
    kinds: dict[str, FloatType] = {"float16": "float16", "bfloat16": "bfloat16"}
    return RowsLayout(shape, kinds.get(stored, "float32"))


def _layer_count(per_layer: int) -> int:
    """Layers that no cache holds, within an eighth of the free memory."""
    wanted = -(-max(_LEAST_BYTES, _CACHES * cache_bytes()) // per_layer)
    return max(1, min(wanted, available_memory() // 8 // per_layer))


def cache_bytes(root: Path = Path("/")) -> int:
    """The size of the processor's last cache; 0 where the system does not tell."""
    sizes = [0]
    for file in root.glob("sys/devices/system/cpu/cpu0/cache/index*/size"):
        text = file.read_text("ascii").strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 10)
    return max(sizes)


def _store(config: MossConfig, layouts: dict[str, RowsLayout | TileLayout]) -> WeightStore:
    """Weights that are the same byte everywhere; each matrix has memory of its own."""
    store = WeightStore()
    memory = _memory(sum(layout.nbytes for layout in layouts.values()))
    start = 0
    for name, layout in layouts.items():
        store.put(Stored(name, memory[start : start + layout.nbytes], layout))
        start += layout.nbytes
    for name, shape in expected_shapes(config).items():
        if len(shape) == 1:
            store.add(name, np.ones(shape, np.float32))
    return store


def _memory(nbytes: int) -> npt.NDArray[np.uint8]:
    """Memory as weights lie in it."""
    memory = Pages(nbytes, "measuring the kernels", "Close other programs.").array
    memory.fill(_FILL)
    return memory
