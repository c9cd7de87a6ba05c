"""fit_device(): how a model would be divided between a device, its host and the disk, and what each token moves.

The plans are those that `load_model` makes. Where the device is here, the rates of its memory and of its link are
measured, and an answer cannot be faster than they allow; how near our kernels come is not predicted.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moss_jt.config import MossConfig
from moss_jt.device import Device
from moss_jt.fit import BASE_BYTES, look_at
from moss_jt.kv_layout import KVType
from moss_jt.layout import Layout, PlainLayout, RowsLayout, TileLayout
from moss_jt.memory import MIB, automatic_memory
from moss_jt.pages import Pages
from moss_jt.placement import TwoPlans, plan_both
from moss_jt.plan import MatrixSize, layouts_of, matrix_sizes, resident_rows, rest_of
from moss_jt.runner import DEFAULT_KV, Compute, kv_type

CONTEXT_BYTES = 512 * MIB  # what a driver takes for a process, where no device is here to be asked
_HOST_BASE = BASE_BYTES + 200 * MIB  # with cupy and the driver's libraries
_MEASURED, _TIMES = 64 * MIB, 16


@dataclass(frozen=True)
class DeviceRates:
    """Of a device, in bytes a second.

    Attributes:
        memory: that it reads and writes when it copies its own memory.
        link: from pinned main memory.
    """

    memory: float
    link: float


@dataclass(frozen=True)
class Step:
    """What a token takes when so many others are cached.

    Attributes:
        position: tokens before it.
        device_bytes: weights on the device.
        link_bytes: weights copied to it.
        disk_bytes: of these, read from disk.
        most_tokens_per_s: what memory and link allow; None where the device is not here.
    """

    position: int
    device_bytes: int
    link_bytes: int
    disk_bytes: int
    most_tokens_per_s: float | None


@dataclass(frozen=True)
class DeviceFit:
    """How a model is divided.

    Attributes:
        name: of the model; `config`: its shape.
        compute, kv: how it computes and caches.
        vram: bytes of the device that may be taken.
        plans: of both memories.
        host_bytes: weights in main memory.
        steps: at the start, in the middle and at the end of the context.
        rates: of the device; None where it is not here.
    """

    name: str
    config: MossConfig
    compute: Compute
    kv: KVType
    vram: int
    plans: TwoPlans
    host_bytes: int
    steps: tuple[Step, ...]
    rates: DeviceRates | None

    def to_dict(self) -> dict[str, Any]:
        """For machines: bytes, tokens a second."""
        device, host = self.plans.device, self.plans.host
        return {
            "model": self.name,
            "compute": self.compute,
            "kv": self.kv,
            "vram": self.vram,
            "context": device.context,
            "device": {
                "weights": device.resident_bytes,
                "kv_bytes_at_full_context": device.kv_bytes(device.context),
                "ring": device.ring_bytes,
                "buffers": device.buffer_bytes,
                "small": device.needs.small,
                "process": device.needs.base + device.needs.margin,
            },
            "host": {"memory": 0 if host is None else host.memory, "weights": self.host_bytes},
            "steps": [asdict(step) for step in self.steps],
            "rates": None if self.rates is None else asdict(self.rates),
        }


def fit_device(
    model: Any,
    *,
    vram: int,
    memory: int | None = None,
    kv: str | None = None,
    compute: Compute = "fast",
    context: int | None = None,
    device: Device | None = None,
) -> DeviceFit:
    """Plan for a device of which `vram` bytes may be taken.

    Args:
        model: a folder with config.json, native or not, whole or not; or a shape.
        memory: bytes of main memory for the whole process; None for what is free, less a reserve.
        kv: type of the cache; None for the usual one.
        context: tokens that the cache must hold; None for n_positions, or for what fits.
        device: where it would run, to be measured; None for a device that is not here.

    Raises:
        ConfigError: either memory is too little, or a value cannot work.
        CheckpointError: the folder's files are broken.
    """
    config, found, _, name = look_at(model)
    kind = DEFAULT_KV[compute] if kv is None else kv_type(kv)
    layouts = _matrices(config, found)
    sizes = matrix_sizes(config, layouts)
    plans = plan_both(
        config,
        sizes,
        layouts,
        kind,
        vram=vram,
        device_base=CONTEXT_BYTES if device is None else device.own_bytes,
        memory=_HOST_BASE + automatic_memory() if memory is None else memory,
        host_base=_HOST_BASE,
        context=None if context is None else min(context, config.n_positions),
    )
    rates = None if device is None else measure(device)
    full = plans.device.context
    steps = tuple(_step(sizes, plans, position, rates) for position in (0, full // 2, full - 1))
    rest = rest_of(sizes, plans.base)
    held = 0 if plans.host is None else sum(size.bytes_of(plans.host.resident[size.name]) for size in rest)
    return DeviceFit(name, config, compute, kind, vram, plans, held, steps, rates)


def _matrices(config: MossConfig, found: Mapping[str, Layout] | None) -> dict[str, RowsLayout | TileLayout]:
    known = layouts_of(config) if found is None else found
    return {name: layout for name, layout in known.items() if not isinstance(layout, PlainLayout)}


def _step(sizes: Sequence[MatrixSize], plans: TwoPlans, position: int, rates: DeviceRates | None) -> Step:
    """The token after `position` others."""
    tokens = position + 1
    rows = resident_rows(sizes, plans.device.resident_budget(tokens))
    held = sum(size.bytes_of(rows[size.name]) for size in sizes)
    total = sum(size.nbytes for size in sizes)
    disk = 0
    for size in sizes:
        base = plans.base[size.name]
        on_host = 0 if plans.host is None else plans.host.resident.get(size.name, 0)
        disk += size.nbytes - size.bytes_of(max(base + on_host, rows[size.name]))
    most = None
    if rates is not None:
        kv = tokens * plans.device.needs.kv_token_bytes
        most = 1 / max((total + kv) / rates.memory, (total - held) / rates.link)
    return Step(position, held, total - held, disk, most)


def measure(device: Device) -> DeviceRates:
    """Copy within a device, and to it from pinned memory; medians of a few runs."""
    nbytes = min(_MEASURED, device.capacity // 4)
    source = Pages(nbytes, "measuring the link", "Close other programs.").array
    source[:] = 1
    there, here = (device.allocate(nbytes, "measuring") for _ in range(2))
    pinned = device.pin(source)
    try:
        link = _rate(device, nbytes, lambda: device.write(there, source, stays=True))
        memory = _rate(device, 2 * nbytes, lambda: device.move(there, here, nbytes))
    finally:
        if pinned:
            device.unpin(source)
        device.close()
    return DeviceRates(memory, link)


def _rate(device: Device, nbytes: int, work: Any) -> float:
    taken = []
    for _ in range(4):
        device.wait(device.record("compute"))
        began = time.perf_counter()
        for _ in range(_TIMES):
            work()
        device.wait(device.record("compute"))
        taken.append(time.perf_counter() - began)
    return _TIMES * nbytes / float(np.median(taken[1:]))
