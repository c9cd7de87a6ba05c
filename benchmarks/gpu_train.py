"""What training has a device do: the products of a layer with frozen weights, forward and back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from gpu_rows import Rows

from moss_jt.config import MossConfig, Quantization
from moss_jt.device import Device
from moss_jt.frozen_device import DeviceFrozen, plan_frozen
from moss_jt.plan import matrix_sizes
from moss_jt.record import spread
from moss_jt.synthetic import layouts_of, synthetic_store

Results = dict[str, Any]
LAYER = MossConfig(vocab_size=512, n_embd=6144, n_layer=1, n_head=24, rotary_dim=64, dtype="float16", name="a layer")
TOKENS = (512, 2048)


def train(
    open_device: Callable[[], Device],
    half_rate: Callable[[int, int, int], float] | None,
    *,
    kinds: Sequence[int] = (4, 8, 16),
    shape: MossConfig = LAYER,
    tokens: Sequence[int] = TOKENS,
    runs: int = 5,
) -> Results:
    """Operations per second of each product of a layer, what it is given and what comes back copied on the way.

    Args:
        kinds: bits of the weights.
        half_rate: gives the operations per second of the device's own product of halves, (T, K) by (K, N), for T, N and K;
            None where there is none.
    """
    results: Results = Rows()
    for bits in kinds:
        quantization = None if bits == 16 else Quantization(4 if bits == 4 else 8, 128)
        config = MossConfig(**{**vars(shape), "quantization": quantization})
        device, store = open_device(), synthetic_store(config)
        layouts = layouts_of(config)
        sizes = matrix_sizes(config, layouts)
        frozen = DeviceFrozen(device, store, sizes, plan_frozen(device, sizes, layouts, max(tokens)))
        frozen.begin_pass()
        for size in sizes[:-1]:
            for count in tokens:
                operations = 2.0 * count * size.rows * size.inputs
                limit = None if half_rate is None else half_rate(count, size.rows, size.inputs)
                for way, work, width in (
                    ("forward", frozen.multiply, size.inputs),
                    ("back", frozen.multiply_transposed, size.rows),
                ):
                    rates = [operations / each for each in _seconds(work, size.name, (count, width), runs)]
                    name = f"{size.stored} {size.name.split('.')[-2]} {count} {way}"
                    row: Results = {"tflop_per_s": spread([rate / 1e12 for rate in rates], 2)}
                    if limit is not None:
                        row["of_halves"] = round(sorted(rates)[len(rates) // 2] / limit, 3)
                    results[name] = row
        device.close()
    return results


def _seconds(work: Callable[[Any, str], Any], name: str, shape: tuple[int, int], runs: int) -> list[float]:
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    work(values, name)
    taken = []
    for _ in range(runs):
        began = time.perf_counter()
        work(values, name)
        taken.append(time.perf_counter() - began)
    return taken
