"""A whole pass on a device that is the host: against the original's arrays, and against itself under every cap."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from host_device import HostDevice

from moss_jt.batch import Batch, single_batch
from moss_jt.cache import KVCache, KVType
from moss_jt.device_ops import DeviceBuffer, DeviceOps, matrices_of
from moss_jt.device_weights import DeviceWeights, bytes_of
from moss_jt.errors import DeviceMemoryError, ShapeError
from moss_jt.layout import TILE_ROWS, TileLayout
from moss_jt.model import Moss
from moss_jt.runner import Model

Load = Callable[[str], Model]
Arrays = dict[str, npt.NDArray[Any]]
GOLDEN = [
    "tiny-fp/safetensors-fp16",
    "tiny-fp-h8/bin-single",
    "tiny-int4/g32",
    "tiny-int4/g32-actorder",
    "tiny-int8/g128",
    "tiny-int8/g128-actorder",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("device")


class Runner:
    """A model's network over a device of its own."""

    def __init__(
        self,
        model: Model,
        device: HostDevice,
        *,
        share: float = 1.0,
        slots: int = 0,
        kv: KVType = "float32",
        rounding: bool = False,
    ) -> None:
        self.device, store, config = device, model.store, model.config
        resident, largest = {}, 0
        for name in matrices_of(config):
            layout = store.layout(name)
            unit = TILE_ROWS if isinstance(layout, TileLayout) else 1
            resident[name] = layout.shape[0] if share == 1 else int(layout.shape[0] * share) // unit * unit
            largest = max(largest, 2 * bytes_of(layout, unit))
        self.weights = DeviceWeights(device, store, resident, slots=slots, slot_bytes=largest if slots else 0)
        self.cache = KVCache(config, slots=2, tokens=128, kind=kv)
        self.ops = DeviceOps(config, device, store, self.weights, self.cache, capacity=64, rounding=rounding)
        self.network: Moss[DeviceBuffer] = Moss(config)

    def forward(self, batch: Batch) -> npt.NDArray[np.float32]:
        for slot in sorted(set(batch.slots.tolist())):
            self.cache.reserve(slot, int((batch.slots == slot).sum()))
        logits: npt.NDArray[np.float32] = self.network.execute(self.ops, batch)
        for slot in sorted(set(batch.slots.tolist())):
            self.cache.commit(slot, int((batch.slots == slot).sum()))
        return logits

    def logits(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Of all tokens of one row: its first half as one pass, then token by token."""
        self.cache.release(0)
        half = len(ids) // 2
        parts = [self.forward(single_batch(ids[:half], wanted=np.arange(half)))]
        parts += [self.forward(single_batch(ids[i : i + 1], start=i)) for i in range(half, len(ids))]
        return np.concatenate(parts)


def expected(golden: Path, name: str) -> Arrays:
    path = golden / name / "expected.npz"
    return dict(np.load(path if path.is_file() else path.parents[1] / "expected.npz"))


@pytest.mark.parametrize("name", GOLDEN)
def test_exact_logits_are_the_originals(name: str, golden: Path, golden_model: Load, folder: Path) -> None:
    want = expected(golden, name)
    runner = Runner(golden_model(name), HostDevice(folder))
    ids = want["b0_ids"][0]
    assert np.abs(runner.logits(ids) - want["b0_logits"][0]).max() < 1e-4


@pytest.mark.parametrize("name", GOLDEN[2:])
def test_fast_logits_are_near_those_of_the_cpu(name: str, golden: Path, golden_model: Load, folder: Path) -> None:
    """The same roundings: what is left is the order of sums, and here and there a code that falls to the other side."""
    ids = expected(golden, name)["b0_ids"][0]
    model = golden_model(name)
    fast = Model(_checkpoint(model), model.store, compute="fast", device="cpu", max_tokens=64)
    found = Runner(model, HostDevice(folder), kv="float16", rounding=True).logits(ids)
    assert np.abs(found - fast.logits(ids)[0]).max() < 2e-2


def _checkpoint(model: Model) -> Any:
    from moss_jt.checkpoint import Checkpoint

    return Checkpoint.open(model.path)


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("name", ["tiny-int4/g32-actorder", "tiny-fp/safetensors-fp16"])
def test_bits_do_not_depend_on_what_is_resident(
    name: str, rounding: bool, golden: Path, golden_model: Load, folder: Path
) -> None:
    """Streams run in random orders; a forgotten event would show. Copying goes on over the end of a pass."""
    ids = expected(golden, name)["b0_ids"][0][:7]
    model = golden_model(name)
    whole = Runner(model, HostDevice(folder), rounding=rounding)
    want = whole.logits(ids)
    assert whole.weights.copied_bytes == 0
    for seed, (share, slots) in enumerate([(0.0, 2), (0.0, 5), (0.5, 2), (0.5, 3), (0.9, 2), (0.0, 1)]):
        runner = Runner(model, HostDevice(folder, seed=seed), share=share, slots=slots, rounding=rounding)
        assert np.array_equal(runner.logits(ids), want), (share, slots)
        passes = 1 + len(ids) - len(ids) // 2
        layouts = [model.store.layout(name) for name in matrices_of(model.config)]
        most = sum(bytes_of(layout, layout.shape[0]) for layout in layouts) * passes
        assert 0 < runner.weights.copied_bytes <= most
        assert runner.device.read_bytes == want.nbytes, "only logits come back"


def test_sequences_of_a_batch_do_not_meet(golden: Path, golden_model: Load, folder: Path) -> None:
    ids = expected(golden, "tiny-int8/g128")["b0_ids"][0]
    model = golden_model("tiny-int8/g128")
    alone = Runner(model, HostDevice(folder)).logits(ids)
    runner = Runner(model, HostDevice(folder))
    count = len(ids) - 1
    both = np.concatenate([ids[:count], ids[:count][::-1]]).astype(np.int32)
    slots, positions = np.repeat([0, 1], count).astype(np.int32), np.tile(np.arange(count), 2).astype(np.int32)
    runner.forward(Batch(both, slots, positions, np.array([0], np.int32)))
    last = runner.forward(single_batch(ids[count:], start=count))
    np.testing.assert_allclose(last[0], alone[-1], atol=1e-5)


def test_a_cap_is_held(golden_model: Load, folder: Path) -> None:
    model = golden_model("tiny-int4/g32")
    needed = HostDevice(folder)
    Runner(model, needed).forward(single_batch(np.array([1, 2], np.int32)))
    runner = Runner(model, HostDevice(folder, capacity=needed.taken))
    runner.forward(single_batch(np.array([1, 2], np.int32)))
    assert runner.device.taken == needed.taken
    with pytest.raises(DeviceMemoryError, match=r"norms and biases takes .* of device memory, and of the .* allowed"):
        Runner(model, HostDevice(folder, capacity=needed.taken - 256)).forward(single_batch(np.array([1], np.int32)))


def test_a_batch_that_cannot_be(golden_model: Load, folder: Path) -> None:
    runner = Runner(golden_model("tiny-int4/g32"), HostDevice(folder))
    with pytest.raises(ShapeError, match="1 to 64 tokens; 65"):
        runner.ops.begin(single_batch(np.ones(65, np.int32)))
    with pytest.raises(ShapeError, match="past the model's"):
        runner.ops.begin(single_batch(np.ones(1, np.int32), start=runner.ops.config.n_positions))
