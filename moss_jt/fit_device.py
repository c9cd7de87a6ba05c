"""fit_device(): how a model would be divided between a device, its host and the disk, and what each token moves.

The plans are those that `load_model` makes. Where the device is here, the rates of its memory and of its link are
measured, and an answer cannot be faster than they allow; how near our kernels come is not predicted. So is what the
host's processor multiplies beside the link, and with it the part of the weights that `host_share="auto"` would leave to it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt import launch, startup
from moss_jt.config import MossConfig
from moss_jt.device import Device, Place
from moss_jt.errors import StartupError
from moss_jt.fit import BASE_BYTES, look_at
from moss_jt.host_share import FEED_FORWARD
from moss_jt.kv_layout import KVType
from moss_jt.layout import Layout, PlainLayout, RowsLayout, TileLayout
from moss_jt.measuring import Bench
from moss_jt.memory import MIB, automatic_memory
from moss_jt.pages import Pages
from moss_jt.placement import TwoPlans, plan_both
from moss_jt.plan import MatrixSize, layouts_of, matrix_sizes, resident_rows, rest_of
from moss_jt.progress import Progress
from moss_jt.runner import DEFAULT_KV, Compute, kv_type
from moss_jt.sharing import SharingRates, best_share, measure_sharing

CONTEXT_BYTES = 512 * MIB  # what a driver takes for a process, where no device is here to be asked
_HOST_BASE = BASE_BYTES + 200 * MIB  # with cupy and the driver's libraries
_MEASURED, _TIMES = 256 * MIB, 16  # more than a device's own cache holds
_TURN_BYTES = 4 * 24576  # inputs or outputs of a product of the 16B model


@dataclass(frozen=True)
class DeviceRates:
    """Of a device, in bytes a second.

    Attributes:
        memory: that it reads and writes when it copies its own memory.
        link: from pinned main memory.
        sharing: of the host's processor beside the link; None where our kernels for it are not compiled, or can have no
            share of such weights.
    """

    memory: float
    link: float
    sharing: SharingRates | None = None


@dataclass(frozen=True)
class Step:
    """What a token takes when so many others are cached.

    Attributes:
        position: tokens before it.
        device_bytes: weights on the device.
        link_bytes: weights copied to it.
        disk_bytes: of these, read from disk.
        most_tokens_per_s: what memory and link allow; None where the device is not here.
        most_shared_tokens_per_s: the same with the host's share of the fit; None where it has none.
    """

    position: int
    device_bytes: int
    link_bytes: int
    disk_bytes: int
    most_tokens_per_s: float | None
    most_shared_tokens_per_s: float | None = None


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
        host_share: what `load_model(host_share="auto")` would take at these rates; None where they were not measured, or
            nothing is copied.
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
    host_share: float | None = None

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
            "host_share": self.host_share,
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
    progress: Progress | None = None,
) -> DeviceFit:
    """Plan for a device of which `vram` bytes may be taken.

    Args:
        model: a folder with config.json, native or not, whole or not; or a shape.
        memory: bytes of main memory for the whole process; None for what is free, less a reserve.
        kv: type of the cache; None for the usual one.
        context: tokens that the cache must hold; None for n_positions, or for what fits.
        device: where it would run, to be measured and closed; None for a device that is not here.
        progress: told about compiling the kernels of the host's share, where Jittor is compiled.

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
    rates = None
    if device is not None:
        with contextlib.closing(device):
            rates = measure(device, _multiplier(config, kind, progress) if compute == "fast" else None)
    full = plans.device.context
    share = None
    if rates is not None and rates.sharing is not None:
        products = _products(sizes, plans, resident_rows(sizes, plans.device.resident_budget(1)))
        share = best_share(rates.sharing, products) if products else None
    steps = tuple(_step(sizes, plans, position, rates, share or 0.0) for position in (0, full // 2, full - 1))
    rest = rest_of(sizes, plans.base)
    held = 0 if plans.host is None else sum(size.bytes_of(plans.host.resident[size.name]) for size in rest)
    return DeviceFit(name, config, compute, kind, vram, plans, held, steps, rates, share)


def _matrices(config: MossConfig, found: Mapping[str, Layout] | None) -> dict[str, RowsLayout | TileLayout]:
    known = layouts_of(config) if found is None else found
    return {name: layout for name, layout in known.items() if not isinstance(layout, PlainLayout)}


def _products(sizes: Sequence[MatrixSize], plans: TwoPlans, rows: Mapping[str, int]) -> list[int]:
    """Bytes of the matrices that are copied for a token and that the host could have a share of: none is on disk."""
    found = []
    for size in sizes:
        copied = size.nbytes - size.bytes_of(rows[size.name])
        if copied and size.name.endswith(FEED_FORWARD) and not _on_disk(size, plans, rows[size.name]):
            found.append(copied)
    return found


def _on_disk(size: MatrixSize, plans: TwoPlans, rows: int) -> int:
    """Bytes of a matrix that are read from disk for a token, where the device has so many of its rows."""
    on_host = 0 if plans.host is None else plans.host.resident.get(size.name, 0)
    return size.nbytes - size.bytes_of(max(plans.base[size.name] + on_host, rows))


def _step(sizes: Sequence[MatrixSize], plans: TwoPlans, position: int, rates: DeviceRates | None, share: float) -> Step:
    """The token after `position` others."""
    tokens = position + 1
    rows = resident_rows(sizes, plans.device.resident_budget(tokens))
    held = sum(size.bytes_of(rows[size.name]) for size in sizes)
    total = sum(size.nbytes for size in sizes)
    disk = sum(_on_disk(size, plans, rows[size.name]) for size in sizes)
    if rates is None:
        return Step(position, held, total - held, disk, None)
    own = (total + tokens * plans.device.needs.kv_token_bytes) / rates.memory
    most, shared = 1 / max(own, (total - held) / rates.link), None
    if share > 0 and rates.sharing is not None:
        products = _products(sizes, plans, rows)
        together = sum(rates.sharing.seconds(nbytes, share) for nbytes in products)
        shared = 1 / max(own, (total - held - sum(products)) / rates.link + together)
    return Step(position, held, total - held, disk, most, shared)


def measure(device: Device, multiply: Callable[[], int] | None = None) -> DeviceRates:
    """Copy within a device, and to it from pinned memory; medians of a few runs.

    Args:
        device: that has nothing else to do; what is taken of its memory is given back when it is closed.
        multiply: multiplies weights on the host as a token does, and tells how many bytes; None not to measure that.
    """
    nbytes = min(_MEASURED, device.capacity // 4)
    source = Pages(nbytes, "measuring the link", "Close other programs.").array
    source[:] = 1
    there, here = (device.allocate(nbytes, "measuring") for _ in range(2))
    pinned = device.pin(source)
    try:
        link = _rate(device, nbytes, lambda: device.write(there, source, stays=True))
        memory = _rate(device, 2 * nbytes, lambda: device.move(there, here, nbytes))
        sharing = None if multiply is None else _sharing(device, source, there, multiply)
    finally:
        device.wait(device.record("copy"))
        if pinned:
            device.unpin(source)
    return DeviceRates(memory, link, sharing)


def _sharing(device: Device, source: npt.NDArray[np.uint8], there: Place, multiply: Callable[[], int]) -> SharingRates:
    """The rates of a host that has a share."""
    few = source[: min(_TURN_BYTES, len(source))].copy()

    def send() -> int:
        device.write(there, source, stream="copy", stays=True)
        return len(source)

    def turn() -> None:
        device.fetch(there, few, device.record("compute"))
        device.write(there, few, stays=True)
        device.wait(device.record("compute"))

    return measure_sharing(device, send, multiply, turn)


def _multiplier(config: MossConfig, kv: KVType, progress: Progress | None) -> Callable[[], int] | None:
    """Computes tokens with weights stored like these on the host, a layer or more that no cache holds; None where
    our kernels for it are not compiled, or can have no share of such weights."""
    if config.quantization is None:
        return None
    try:
        if startup.compile_needed("cpu"):
            return None
    except StartupError:
        return None
    launch.warm_up(progress)
    bench = Bench(f"int{config.quantization.bits}", kv, rounding=True)

    def multiply() -> int:
        bench.step(0, 1)
        return bench.nbytes

    return multiply


def _rate(device: Device, nbytes: int, work: Callable[[], None]) -> float:
    taken = []
    for _ in range(4):
        device.wait(device.record("compute"))
        began = time.perf_counter()
        for _ in range(_TIMES):
            work()
        device.wait(device.record("compute"))
        taken.append(time.perf_counter() - began)
    return _TIMES * nbytes / float(np.median(taken[1:]))
