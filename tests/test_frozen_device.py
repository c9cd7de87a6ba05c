"""Products of training on a device: as numpy has them under every limit, and never trusted unseen."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from host_device import HostDevice

from moss_jt.adapter import AdapterShape
from moss_jt.checkpoint import Checkpoint
from moss_jt.converters.hf2jittor import hf2jittor
from moss_jt.errors import ConfigError, KernelError
from moss_jt.finetune.lora import over_folder
from moss_jt.finetune.settings import TrainSettings
from moss_jt.finetune.start import read_floats
from moss_jt.frozen_device import DeviceFrozen
from moss_jt.memory import parse_size, resident_memory
from moss_jt.plan import Plan, make_plan, matrix_sizes
from moss_jt.progress import Quiet

Array = npt.NDArray[Any]
SETS = ["tiny-int4/g32-actorder", "tiny-int8/g128", "tiny-fp/safetensors-bf16", "tiny-fp/safetensors-fp16"]
PLENTY = 1 << 28


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("device")


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    target = tmp_path_factory.mktemp("native") / "model"
    hf2jittor(golden / request.param, target)
    return Checkpoint.open(target)


def frozen_on(device: HostDevice, checkpoint: Checkpoint, memory: int | None = None) -> DeviceFrozen:
    found = over_folder(
        checkpoint,
        AdapterShape(rank=2, alpha=4.0),
        TrainSettings(batch_size=2, pass_tokens=100),
        longest=50,
        memory=memory,
        device=device,
        progress=Quiet(),
    ).frozen
    assert isinstance(found, DeviceFrozen)
    return found


def least_capacity(checkpoint: Checkpoint, folder: Path) -> int:
    """Of a device that is not refused."""
    with pytest.raises(ConfigError, match="is too little") as told:
        frozen_on(HostDevice(folder, 1 << 16), checkpoint)
    return parse_size(str(told.value).partition("at least ")[2].rstrip(".")) + (1 << 12)


@pytest.mark.parametrize("checkpoint", SETS[:1], indirect=True)
def test_weights_leave_room_for_what_a_pass_keeps(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """They took all but a few tokens' activations, and training passed its limit by those of the others."""
    plans: list[Plan] = []

    def planned(*args: Any, **more: Any) -> Plan:
        plans.append(make_plan(*args, **more))
        return plans[-1]

    monkeypatch.setattr("moss_jt.finetune.lora.make_plan", planned)
    monkeypatch.setattr("moss_jt.finetune.lora.resident_memory", lambda: 50 << 20)
    begin = partial(
        over_folder,
        checkpoint,
        AdapterShape(rank=2, alpha=4.0),
        TrainSettings(batch_size=2, pass_tokens=100),
        longest=50,
        progress=Quiet(),
    )
    begin(memory=1 << 40)
    total, fixed = plans[0].total_bytes, plans[0].needs.fixed
    assert plans[0].streamed_bytes == 0
    memory = fixed + plans[0].kv_bytes(100) + total - (1 << 14)
    begin(memory=memory)
    plan = plans[-1]
    assert plan.streamed_bytes > 0
    assert plan.needs.fixed + plan.ring_bytes + plan.resident_bytes + plan.kv_bytes(100) <= plan.memory


@pytest.mark.parametrize(
    ("checkpoint", "room"),
    [
        *((name, room) for name in SETS for room in ("all", "least")),
        (SETS[0], "half"),
        (SETS[0], "and less on the host"),
    ],
    indirect=["checkpoint"],
)
def test_products(jittor: Any, checkpoint: Checkpoint, folder: Path, room: str) -> None:
    """Of every matrix, forward and backward, in an order that no pass of inference has."""
    layouts = {name: entry.layout for name, entry in checkpoint.entries.items()}
    names = [size.name for size in matrix_sizes(checkpoint.config, layouts)]
    weights = {name: read_floats(checkpoint, name).astype(np.float64) for name in names}
    least, total = least_capacity(checkpoint, folder), sum(values.size for values in weights.values())
    capacity = {"all": PLENTY, "half": least + total // 4}.get(room, least)
    device = HostDevice(folder, capacity)
    memory = resident_memory() + (512 << 20) if room == "and less on the host" else None
    frozen = frozen_on(device, checkpoint, memory)
    assert frozen.weights.is_whole == (room == "all")
    rng = np.random.default_rng(0)
    frozen.begin_pass()
    for tokens, order in ((20, names), (5, names[::-1]), (70, names[-2:])):  # the last are more than have room at once
        for name in order:
            n, k = weights[name].shape
            x, dy = rng.normal(size=(tokens, k)).astype(np.float32), rng.normal(size=(tokens, n)).astype(np.float32)
            near(frozen.multiply(x, name), x @ weights[name].T, name)
            near(frozen.multiply_transposed(dy * np.float32(1e-6), name), dy @ weights[name] * 1e-6, f"{name}, back")
    frozen.begin_pass()
    near(frozen.multiply(x, name), x @ weights[name].T, "what came to stay")
    assert device.taken <= capacity
    device.close()


def near(got: Array, want: Array, name: str) -> None:
    assert np.abs(got - want).max() <= 2e-3 * np.abs(want).max(), name


@pytest.mark.parametrize("checkpoint", SETS[:1], indirect=True)
@pytest.mark.parametrize("kernel", ["halve_tokens", "transposed"])
def test_a_kernel_that_does_nothing_is_found(
    jittor: Any, checkpoint: Checkpoint, folder: Path, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = HostDevice(folder, PLENTY)
    launch = device.launch

    def broken(source: str, name: str, *rest: Any) -> None:
        if not name.startswith(kernel):
            launch(source, name, *rest)

    monkeypatch.setattr(device, "launch", broken)
    with pytest.raises(KernelError, match=r"the host computes wrong: what .* passes back is off by"):
        frozen_on(device, checkpoint)
