"""HostShare: the last rows of feed-forward matrices multiplied by the host's processor while the device has the others.

Where weights are streamed, the link is the slowest part, and the host may read its own memory faster than the link
takes bytes away. So for few tokens a part of the rows that would be copied stays: inputs come from the device, which
is kilobytes, our CPU kernels multiply, and the outputs go back. For many tokens everything is copied, as the device
then multiplies far faster. Only rows that lie in the host's memory are left to it, and only int4 and int8 with
rounded inputs. Which part is best, `measure` tells on the weights themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt.device import Device, Event, Place
from moss_jt.launch import LINEAR_ROUNDED, ROUND_ACTIVATIONS, Buffer, Steps, aligned
from moss_jt.layout import TILE_ROWS, TileLayout
from moss_jt.ops import PROCESSORS, ROUND_BLOCK, layout_data
from moss_jt.pages import Pages
from moss_jt.plan import MatrixSize
from moss_jt.sharing import SharingRates, measure_sharing
from moss_jt.weights import WeightStore

TOKENS = 4  # of a pass at most
FEED_FORWARD = (".mlp.fc_in.weight", ".mlp.fc_out.weight")


class HostShare:
    """Rows that the host multiplies.

    Args:
        device: where the rest is multiplied.
        store: of the weights.
        sizes: of all matrices.
        share: of the rows that would be copied, 0 to 1; may be changed between passes.
    """

    def __init__(self, device: Device, store: WeightStore, sizes: list[MatrixSize], share: float) -> None:
        self._device, self._store, self.share = device, store, share
        layouts = {size.name: store.layout(size.name) for size in sizes if size.name.endswith(FEED_FORWARD)}
        self._layouts = {name: layout for name, layout in layouts.items() if isinstance(layout, TileLayout)}
        widest = max((max(layout.shape[0], layout.padded_in) for layout in self._layouts.values()), default=1)
        self._memory = Pages(2 * 4 * TOKENS * widest, "the host's share", "Close other programs.").array.view(
            np.float32
        )
        self._x, self._y = self._memory.reshape(2, TOKENS * widest)
        self._pinned = device.pin(self._memory)
        blocks = max(
            (each.n_groups * -(-each.padded_group // ROUND_BLOCK) for each in self._layouts.values()), default=1
        )
        self._rounded = [Buffer(aligned(shape, kind)) for shape, kind in _rounded(TOKENS * widest, TOKENS * blocks)]
        self._nothing = Buffer(aligned((2,), "float32"))
        self._kept: dict[str, Buffer] = {}
        self._steps = Steps()

    def first_row(self, name: str, held: int, tokens: int) -> int | None:
        """The row of a matrix from which on the host multiplies, where the device has `held`; None where it does not."""
        layout = self._layouts.get(name)
        if layout is None or tokens > TOKENS:
            return None
        tiles = (layout.n_tiles * TILE_ROWS - held) // TILE_ROWS
        left = int(tiles * self.share)
        if not left or not self._has_rest(name):
            return None
        return max(held, (layout.n_tiles - left) * TILE_ROWS)

    def _has_rest(self, name: str) -> bool:
        """Whether the last rows of a matrix lie in the host's memory."""
        here = self._store.held(name)
        return here is not None and here.first + here.count == self._layouts[name].shape[0]

    def products(self, held: Callable[[str], int]) -> dict[str, int]:
        """Bytes of each matrix that are copied for a token and that the host could multiply.

        Args:
            held: rows of a matrix that the device has.
        """
        streamed = {name: layout.n_tiles - held(name) // TILE_ROWS for name, layout in self._layouts.items()}
        return {
            name: tiles * self._layouts[name].tile_bytes
            for name, tiles in streamed.items()
            if tiles > 0 and self._has_rest(name)
        }

    def measure(self, products: Mapping[str, int], target: Place, room: int) -> SharingRates:
        """How fast these products are copied and multiplied, alone and at once.

        Args:
            products: as `products` gives them, one at least.
            target: memory of the device that may be written to, `room` bytes.
        """
        names, sources = itertools.cycle(products), itertools.cycle(self._rows_of(products, room))
        self._x.fill(1)

        def send() -> int:
            values = next(sources)
            self._device.write(target, values, stream="copy", stays=True)
            return len(values)

        def multiply() -> int:
            name = next(names)
            self._product(name, self._first_of(name, products[name]), tokens=1, bias=None)
            return products[name]

        def turn() -> None:  # the inputs stay ones: what is fetched may be anything
            one = min(len(self._x), room // 4) // TOKENS
            self._device.fetch(target, self._y[:one], self._device.record("compute"))
            self._device.write(target, self._x[:one], stays=True)
            self._device.wait(self._device.record("compute"))

        return measure_sharing(self._device, send, multiply, turn)

    def _rows_of(self, products: Mapping[str, int], room: int) -> list[npt.NDArray[np.uint8]]:
        """The bytes of these products on the host, in parts of at most `room`."""
        parts = []
        for name, nbytes in products.items():
            here = self._store.held(name)
            assert here is not None, "products() looks for it"
            start = (
                here.start + (self._first_of(name, nbytes) - here.first) // TILE_ROWS * self._layouts[name].tile_bytes
            )
            parts += [here.data[at : min(at + room, start + nbytes)] for at in range(start, start + nbytes, room)]
        return parts

    def _first_of(self, name: str, nbytes: int) -> int:
        """The row with which the last `nbytes` of a matrix begin."""
        layout = self._layouts[name]
        return (layout.n_tiles - nbytes // layout.tile_bytes) * TILE_ROWS

    def close(self) -> None:
        """Give the memory up, when nothing is copied from it any more."""
        if self._pinned:
            self._device.unpin(self._memory)

    def multiply(
        self, name: str, first: int, x: Place, y: Place, *, tokens: int, ready: Event, bias: str | None
    ) -> None:
        """Rows [first, N) of a product: x (tokens, K) and y (tokens, N) are on the device; waits for x.

        Args:
            ready: when x is there.
            bias: its name, where there is one.
        """
        rows, width = self._layouts[name].shape
        self._device.fetch(x, self._x[: tokens * width], ready)
        self._product(name, first, tokens=tokens, bias=bias)
        for token in range(tokens):
            made = self._y[token * rows + first : (token + 1) * rows]
            self._device.write(y.after(4 * (token * rows + first)), made, stays=True)

    def _product(self, name: str, first: int, *, tokens: int, bias: str | None) -> None:
        """Rows [first, N) of a product of what lies in `_x`, to `_y`."""
        layout = self._layouts[name]
        rows, width = layout.shape
        here, perm = self._store.held(name), self._store.perm(name)
        assert here is not None, "first_row looks for it"
        order = self._nothing if perm is None else self._buffer(f"{name} order", perm)
        data: dict[str, Any] = layout_data(layout) | {
            "tokens": tokens,
            "x_stride": width,
            "y_stride": rows,
            "has_bias": bias is not None,
            "add": False,
            "block": ROUND_BLOCK,
            "processor": PROCESSORS["best"],
            "permuted": perm is not None,
        }
        rounded = [buffer.address for buffer in self._rounded]
        self._steps.add(ROUND_ACTIVATIONS, [self._x.ctypes.data, order.address], rounded, data | {"x_stride": width})
        start = here.start + (first - here.first) // TILE_ROWS * layout.tile_bytes
        data |= {"blob_at": start, "first": first, "out": rows - first, "x_stride": 0}
        added = self._nothing if bias is None else self._buffer(bias, self._store.small(bias))
        codes, steps, sums = rounded
        inputs = [codes, self._buffer(f"{name} rows", here.data).address, added.address, steps, sums]
        self._steps.add(LINEAR_ROUNDED, inputs, [self._y.ctypes.data], data)
        self._steps.run()

    def _buffer(self, key: str, values: npt.NDArray[Any]) -> Buffer:
        """What a kernel reads, for as long as it lies where it lay."""
        kept = self._kept.get(key)
        if kept is None or kept.address != values.ctypes.data:
            kept = self._kept[key] = Buffer(values)
        return kept


def _rounded(codes: int, blocks: int) -> list[tuple[tuple[int], str]]:
    return [((codes,), "int8"), ((blocks,), "float32"), ((blocks,), "int32")]
