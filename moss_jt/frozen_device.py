"""Products with frozen matrices on a device, for training: mixed precision.

The matrices lie where inference has them (`moss_jt.device_weights`): as many rows as fit in the device's memory, the rest
copied piece by piece, forward as backward. What is multiplied is brought there rounded to half, each token's gradients
with a power of two of their own, and summed in float32; everything else of training stays with the host's processor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moss_jt.device import Device, Place, Slab
from moss_jt.device_products import DeviceProducts
from moss_jt.device_weights import DeviceWeights
from moss_jt.errors import ConfigError, KernelError
from moss_jt.host_share import HostShare
from moss_jt.layout import Layout, PlainLayout, RowsLayout, TileLayout
from moss_jt.memory import format_size
from moss_jt.plan import MARGIN, MatrixSize, Needs, Plan, make_plan, smallest_memory
from moss_jt.progress import Progress
from moss_jt.weights import WeightStore
from moss_jt.workspace import PINNED_BYTES, DeviceBuffer, blocks_of

Floats = npt.NDArray[np.float32]
Layouts = Mapping[str, RowsLayout | TileLayout]

_LEAST_TOKENS = 64  # that should have room at once, however small the memory is
_MOST_TOKENS = 1 << 15  # of a launch, whose grid has up to 65,535 of them
_BUFFERS_SHARE = 4  # buffers of more take one part of a device's memory of so many, at most
_ALIGNMENT = 256  # of what is taken from the slab
_CHECKED_TOKENS, _CHECKED_WITHIN = 70, 1e-2


@dataclass(frozen=True)
class FrozenPlan:
    """How the memory of a device is divided.

    Attributes:
        plan: as in inference, without a cache.
        tokens: that have room at once, of the widest matrix but the head; more go one part after the other.
    """

    plan: Plan
    tokens: int


def plan_frozen(device: Device, sizes: Sequence[MatrixSize], layouts: Mapping[str, Layout], tokens: int) -> FrozenPlan:
    """Divide the memory of a device for products of training.

    Args:
        sizes: of the matrices.
        layouts: of them, and perhaps of others.
        tokens: of the longest pass.

    Raises:
        ConfigError: it is too little; says how much would do.
    """
    memory = device.own_bytes + device.capacity
    matrices = {size.name: found for size in sizes if not isinstance(found := layouts[size.name], PlainLayout)}
    first = min(tokens, _LEAST_TOKENS)
    least = smallest_memory(sizes, _needs(sizes, matrices, tokens=first, base=device.own_bytes), context=1)
    if memory < least:
        raise ConfigError(
            f"{format_size(memory)} on {device.name} is too little: training with it takes at least {format_size(least)}."
        )
    one, two = (sum(_buffer_bytes(matrices, 1024 * count).values()) for count in (1, 2))
    more = min((memory - least) // 2, device.capacity // _BUFFERS_SHARE) * 1024 // max(1, two - one)
    at_once = min(tokens, first + more)
    needs = _needs(sizes, matrices, tokens=at_once, base=device.own_bytes)
    return FrozenPlan(make_plan(sizes, needs, memory=memory, context=1), at_once)


def _needs(sizes: Sequence[MatrixSize], layouts: Layouts, *, tokens: int, base: int) -> Needs:
    return Needs(
        base=base,
        buffers=sum(_buffer_bytes(layouts, tokens).values()) + 8 * _ALIGNMENT,
        small=sum(size.extra_bytes + _ALIGNMENT for size in sizes),
        kv_token_bytes=0,
        margin=MARGIN + sum(size.nbytes for size in sizes) // PINNED_BYTES,
    )


def _numbers(layouts: Layouts, tokens: int) -> int:
    """Of a buffer for inputs or results: `tokens` of every matrix but the head, and one of that."""
    widest = max((max(layout.shape) for name, layout in layouts.items() if name != "lm_head.weight"), default=1)
    return max(tokens * widest, *(max(layout.shape) for layout in layouts.values()))


def _at_once(layout: RowsLayout | TileLayout, numbers: int) -> int:
    """Tokens that have room in buffers of so many numbers."""
    return min(numbers // max(layout.shape), _MOST_TOKENS)


def _buffer_bytes(layouts: Layouts, tokens: int) -> dict[str, int]:
    numbers, codes, runs = _numbers(layouts, tokens), 0, 0
    for layout in layouts.values():
        count = _at_once(layout, numbers)
        inputs = layout.padded_in if isinstance(layout, TileLayout) else layout.shape[1]
        codes, runs = max(codes, count * max(inputs, layout.shape[0])), max(runs, count * blocks_of(layout))
    return {"given": 4 * numbers, "result": 4 * numbers, "codes": 2 * codes, "steps": 4 * runs, "sums": 4 * runs}


class _Space:
    """Device memory of the products; a `moss_jt.device_products.Space`."""

    share: HostShare | None = None  # the host's kernels take other inputs, and never transposed

    def __init__(
        self,
        device: Device,
        store: WeightStore,
        sizes: Sequence[MatrixSize],
        plan: Plan,
        buffers: Mapping[str, int],
    ) -> None:
        self.device, self.store = device, store
        slab = Slab(device, plan.memory - plan.needs.base - plan.needs.margin, "the model")
        places = {name: slab.take(nbytes, name) for name, nbytes in buffers.items()}
        self.given, self.result = places["given"], places["result"]
        self.rounded = (places["codes"], places["steps"], places["sums"])
        self._orders: dict[str, Place] = {}
        for size in sizes:
            order = store.perm(size.name)
            if order is not None:
                self._orders[size.name] = slab.take(order.nbytes, "orders of inputs")
                device.write(self._orders[size.name], order)
        self.weights = DeviceWeights(device, store, sizes, slab, slots=plan.ring_slots, slot_bytes=plan.slot_bytes)

    def small(self, name: str) -> Place:
        """Where the order of the inputs of a matrix lies."""
        return self._orders[name]


class DeviceFrozen:
    """y = x W^T over the matrices of a store, on a device; a `moss_jt.frozen.Frozen`.

    Args:
        device: stays the caller's.
        store: of the rows that are not on the device; its memory is pinned.
        sizes: of the matrices.
        planned: how the device's memory is divided.
        progress: told about filling the device.

    Raises:
        CheckpointError: matrices cannot be read.
        DeviceMemoryError: the device does not give what was planned.
        KernelError: it multiplies wrong.
    """

    def __init__(
        self,
        device: Device,
        store: WeightStore,
        sizes: Sequence[MatrixSize],
        planned: FrozenPlan,
        progress: Progress | None = None,
    ) -> None:
        for part in store.memory:
            device.pin(part)
        layouts = {size.name: store.layout(size.name) for size in sizes}
        self._device, self._store = device, store
        self._numbers = _numbers(layouts, planned.tokens)
        self._space = _Space(device, store, sizes, planned.plan, _buffer_bytes(layouts, planned.tokens))
        self._products = DeviceProducts(self._space, "float16")
        self.weights = self._space.weights
        self.weights.load(planned.plan.resident, progress)
        for name in {layout: name for name, layout in layouts.items()}.values():
            self._check(name)

    def begin_pass(self) -> None:
        """A pass over the layers begins."""
        self.weights.begin_pass()

    def multiply(self, x: Floats, name: str) -> Floats:
        """The product: (T, K) to (T, N)."""
        rows, inputs = self._store.layout(name).shape
        given, result = DeviceBuffer(self._space.given, inputs), DeviceBuffer(self._space.result, rows)
        y = np.empty((len(x), rows), np.float32)
        for part in self._parts(name, len(x)):
            self._device.write(given.place, np.ascontiguousarray(x[part]))
            self._products.multiply(given, name, None, result, tokens=part.stop - part.start)
            self._device.read(result.place, y[part])
        return y

    def multiply_transposed(self, dy: Floats, name: str) -> Floats:
        """The gradient of the product by its inputs: (T, N) to (T, K)."""
        rows, inputs = self._store.layout(name).shape
        given, result = DeviceBuffer(self._space.given, rows), DeviceBuffer(self._space.result, inputs)
        dx = np.empty((len(dy), inputs), np.float32)
        for part in self._parts(name, len(dy)):
            self._device.write(given.place, np.ascontiguousarray(dy[part]))
            self._products.multiply_transposed(given, name, result, tokens=part.stop - part.start)
            self._device.read(result.place, dx[part])
        return dx

    def _parts(self, name: str, tokens: int) -> list[slice]:
        """The tokens in parts that have room, each a slice."""
        at_once = _at_once(self._store.layout(name), self._numbers)
        return [slice(start, min(start + at_once, tokens)) for start in range(0, tokens, at_once)]

    def _check(self, name: str) -> None:
        """See that the two products belong together: of y = x W^T and dx = y W, the sum of x dx is that of y y.

        Raises:
            KernelError: they do not.
        """
        x = np.random.default_rng(0).standard_normal((_CHECKED_TOKENS, self._store.layout(name).shape[1]), np.float32)
        y = self.multiply(x, name)
        want, found = np.vdot(y, y), np.vdot(x, self.multiply_transposed(y, name))
        if not abs(found - want) <= _CHECKED_WITHIN * want:
            raise KernelError(
                f"{self._device.name} computes wrong: what {name} passes back is off by {abs(found / want - 1):.2g} in sum. "
                "`moss-jt doctor` looks at driver and CUDA."
            )
