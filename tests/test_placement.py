"""A model whose device is the host, from loading to answers: the same as on the CPU, within both memories."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_device import HostDevice

from moss_jt.adapter import Adapter, AdapterShape, save_adapter
from moss_jt.batch import single_batch
from moss_jt.config import GenerationConfig
from moss_jt.engine import Engine
from moss_jt.errors import ConfigError, DeviceMemoryError
from moss_jt.load import load_model
from moss_jt.memory import parse_size
from moss_jt.messages import Request, TokenEvent
from moss_jt.runner import Model
from moss_jt.sharing import SharingRates, measure_sharing
from moss_jt.shortlist import FOUND, Wish

Load = Callable[[str], Model]
NO_ROWS = 1e-6  # a share of the host too small for a tile: inputs are rounded as it would, and the device does all
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=6, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("device")


def answers(
    model: Model, prompts: list[tuple[int, ...]], slots: int, config: GenerationConfig = GREEDY
) -> list[list[int]]:
    engine = Engine(model, slots=slots)
    numbers = [engine.submit(Request(prompt, config)) for prompt in prompts]
    found: dict[int, list[int]] = {number: [] for number in numbers}
    while engine.busy:
        for event in engine.step():
            if isinstance(event, TokenEvent):
                found[event.request].append(event.id)
    return [found[number] for number in numbers]


@pytest.mark.parametrize("name", ["tiny-int4/g32-actorder", "tiny-fp/safetensors-fp16"])
def test_answers_are_those_of_the_cpu(name: str, golden_model: Load, folder: Path) -> None:
    """Three conversations in two slots; greedy tokens in exact compute."""
    model = golden_model(name)
    prompts: list[tuple[int, ...]] = [(1, 2, 3), (7, 8, 9, 10, 11), (5,)]
    device = HostDevice(folder)
    loaded = load_model(model.path, device, max_tokens=64)
    assert loaded.device == "the host"
    assert answers(loaded, prompts, 2) == answers(model, prompts, 2)
    stats = Engine(loaded).stats()
    assert stats["device_bytes"] == sum(size for size in _bytes_of(model))
    assert stats["link_bytes"] == stats["streamed_bytes"] == 0
    assert stats["vram_limit"] == device.own_bytes + device.capacity


def _bytes_of(model: Model) -> list[int]:
    from moss_jt.plan import matrix_sizes

    layouts = {size.name: model.store.layout(size.name) for size in matrix_sizes(model.config)}
    return [size.nbytes for size in matrix_sizes(model.config, layouts)]


def test_candidates_give_the_answers_that_all_logits_give(
    golden_model: Load, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no more than them comes back from the device."""
    model = golden_model("tiny-int8/g128")
    drawn = GenerationConfig(temperature=1.3, top_k=20, top_p=0.9, max_new_tokens=8, seed=5)
    prompts: list[tuple[int, ...]] = [(1, 2, 3), (9, 8)]
    device = HostDevice(folder)
    found = answers(load_model(model.path, device, max_tokens=64), prompts, 2, drawn)
    passes = 8
    assert device.read_bytes <= 2 * FOUND.itemsize * (passes + 1)
    monkeypatch.setattr(Wish, "wanted", 0)
    assert answers(load_model(model.path, HostDevice(folder), max_tokens=64), prompts, 2, drawn) == found


def test_a_small_device_gives_the_same_answers(golden_model: Load, folder: Path) -> None:
    model = golden_model("tiny-int8/g128")
    prompts: list[tuple[int, ...]] = [tuple(range(1, 40)), (4, 5)]
    want = answers(load_model(model.path, HostDevice(folder), "fast", max_tokens=64), prompts, 2)
    device = HostDevice(folder, capacity=_least(model, folder))
    small = load_model(model.path, device, "fast", max_tokens=64)
    assert answers(small, prompts, 2) == want
    assert small.placed is not None
    assert small.placed.space.weights.copied_bytes > 0
    assert device.taken <= device.capacity
    assert device.pinned, "weights on the host are pinned"


@pytest.mark.parametrize("name", ["tiny-int4/g32-actorder", "tiny-fp/safetensors-fp16"])
def test_an_adapter_is_computed_on_the_device(name: str, golden_model: Load, folder: Path, tmp_path: Path) -> None:
    model = golden_model(name)
    shape = AdapterShape(rank=4, alpha=6.0, targets=("qkv_proj", "fc_out"))
    random = np.random.default_rng(0)
    terms = {each: random.normal(0, 0.1, size).astype(np.float32) for each, size in shape.shapes(model.config).items()}
    save_adapter(tmp_path / "adapter", Adapter(shape, terms), model.config)
    ids = np.arange(1, 9)
    on_cpu = load_model(model.path, "cpu", max_tokens=64, adapter=tmp_path / "adapter").logits(ids)
    device: Any = HostDevice(folder)
    on_device = load_model(model.path, device, max_tokens=64, adapter=tmp_path / "adapter").logits(ids)
    assert np.abs(on_device - on_cpu).max() < 1e-4
    assert np.abs(on_cpu - model.logits(ids)).max() > 1e-2, "the adapter does something"
    assert device.own_bytes + device.taken <= device.own_bytes + device.capacity


@pytest.mark.parametrize("name", ["tiny-int4/g32-actorder", "tiny-int8/g128"])
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_the_host_multiplies_its_share(name: str, share: float, golden_model: Load, folder: Path) -> None:
    """Logits are those of the device alone with inputs in int8, but for the order of sums; less is copied a token."""
    model = golden_model(name)
    limit = _least(model, folder)
    ids = np.arange(1, 9)
    alone, shared = (
        load_model(model.path, HostDevice(folder, limit, seed=3), "fast", max_tokens=64, host_share=part)
        for part in (NO_ROWS, share)
    )
    found = []
    for each in (alone, shared):
        runner = each.runner()
        assert each.placed is not None
        parts = []
        for start, count in ((0, 5), (5, 1), (6, 2)):
            runner.cache.reserve(0, count)
            before = each.placed.space.weights.copied_bytes
            parts.append(runner.forward(single_batch(ids[start : start + count], start=start, wanted=np.arange(count))))
            runner.cache.commit(0, count)
            moved = each.placed.space.weights.copied_bytes - before
        found.append((np.concatenate(parts), moved))
    assert np.abs(found[0][0] - found[1][0]).max() < 2e-2
    assert np.array_equal(found[0][0][:5], found[1][0][:5]), "prompts are left to the device"
    assert found[1][1] < found[0][1]


# a link of 20 GB/s, and a processor that multiplies 30 GB/s, less where both read the same memory
KNOWN = SharingRates(link=20e9, link_beside=15e9, host=30e9, host_beside=25e9, turn_s=0.0)
NOTHING = "nothing is copied for a token that the processor could multiply"
LoadAuto = Callable[[Model, HostDevice], Model]


@pytest.fixture
def load_auto(caplog: pytest.LogCaptureFixture) -> Iterator[LoadAuto]:
    """Loads with a share of the host's that is chosen, which is told in the log."""
    with caplog.at_level("INFO", "moss_jt.load"):
        yield lambda model, device: load_model(model.path, device, "fast", max_tokens=64, host_share="auto")


def test_the_host_gets_the_share_that_pays(
    golden_model: Load,
    folder: Path,
    load_auto: LoadAuto,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is measured on the weights, chosen, told, and computed as if somebody had asked for it."""
    model = golden_model("tiny-int8/g128")
    limit, prompts = _least(model, folder), [tuple(range(1, 6))]
    measured: list[SharingRates] = []

    def measure(*arguments: Any) -> SharingRates:
        measured.append(measure_sharing(*arguments))
        return KNOWN

    monkeypatch.setattr("moss_jt.host_share.measure_sharing", measure)
    device = HostDevice(folder, limit)
    chosen = load_auto(model, device)
    assert measured[0].link > 0 < measured[0].host and measured[0].turn_s > 0
    assert "it gets 0.62 of the feed-forward weights" in caplog.text
    assert Engine(chosen).stats()["host_share"] == 0.625
    asked = load_model(model.path, HostDevice(folder, limit), "fast", max_tokens=64, host_share=0.625)
    assert answers(chosen, prompts, 1) == answers(asked, prompts, 1)
    assert chosen.placed is not None and asked.placed is not None
    assert chosen.placed.space.weights.copied_bytes == asked.placed.space.weights.copied_bytes > 0
    assert device.taken <= device.capacity


@pytest.mark.parametrize("name", ["tiny-int8/g128", "tiny-fp/safetensors-fp16"])
def test_nothing_is_measured_where_the_host_can_have_no_share(
    name: str, golden_model: Load, folder: Path, load_auto: LoadAuto, caplog: pytest.LogCaptureFixture
) -> None:
    """A device that holds everything; and weights that are not quantised."""
    model = golden_model(name)
    limit = 1 << 30 if "int8" in name else _least(model, folder)
    loaded = load_auto(model, HostDevice(folder, limit))
    assert NOTHING in caplog.text
    assert loaded.placed is not None and loaded.placed.space.share is None


def test_the_host_gets_nothing_where_the_link_is_faster(
    golden_model: Load,
    folder: Path,
    load_auto: LoadAuto,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Then inputs are rounded as without a share, and no memory of it stays pinned."""
    model = golden_model("tiny-int8/g128")
    device = HostDevice(folder, _least(model, folder))
    monkeypatch.setattr("moss_jt.host_share.measure_sharing", lambda *_: replace(KNOWN, link=60e9))
    loaded = load_auto(model, device)
    assert "it gets 0.00 of the feed-forward weights" in caplog.text
    assert loaded.placed is not None and loaded.placed.space.share is None
    assert len(device.pinned) == len(loaded.store.memory)
    assert Engine(loaded).stats()["host_share"] == 0.0


def test_exact_compute_has_nothing_to_share(golden_model: Load, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = golden_model("tiny-int8/g128")
    device = HostDevice(folder, _least(model, folder))
    with caplog.at_level("INFO", "moss_jt.load"):
        loaded = load_model(model.path, device, "exact", kv="fp16", max_tokens=64, host_share="auto")
    assert loaded.placed is not None and loaded.placed.space.share is None
    assert "host_share" not in caplog.text


def _least(model: Model, folder: Path) -> int:
    """The least memory of a device that is accepted."""
    with pytest.raises(ConfigError, match="give at least") as told:
        load_model(model.path, HostDevice(folder, capacity=4096), "fast", max_tokens=64)
    return parse_size(str(told.value).partition("give at least ")[2].partition(",")[0].partition(";")[0])


def test_what_loading_refuses(golden_model: Load, folder: Path) -> None:
    model = golden_model("tiny-int8/g128")
    device: Any = HostDevice(folder, capacity=1 << 22)
    with pytest.raises(ConfigError, match="is too little for a context of"):
        load_model(model.path, device, "fast", memory=1 << 20)


@pytest.mark.parametrize("ours", [True, False])
def test_a_device_is_given_back_where_loading_fails(
    ours: bool, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was opened for it; another stays its owner's."""
    device = HostDevice(tmp_path)
    closed: list[bool] = []
    monkeypatch.setattr(device, "close", lambda: closed.append(True))
    monkeypatch.setattr("moss_jt.load.open_accelerator", lambda *_: device)
    monkeypatch.setattr("moss_jt.load.check_device", lambda _: None)

    def full(*_: object, **__: object) -> None:
        raise DeviceMemoryError("the device is full.")

    monkeypatch.setattr("moss_jt.load.place", full)
    with pytest.raises(DeviceMemoryError, match="is full"):
        load_model(golden / "tiny-int4" / "g32", device="cuda" if ours else device)
    assert closed == ([True] if ours else [])


def test_a_device_without_room_for_its_check_is_left_to_others(
    golden: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = HostDevice(folder, capacity=1 << 16)
    monkeypatch.setattr("moss_jt.load.open_accelerator", lambda *_: device)
    assert load_model(golden / "tiny-int4" / "g32").device == "cpu"
    assert "The CPU computes." in caplog.text
    with pytest.raises(DeviceMemoryError):
        load_model(golden / "tiny-int4" / "g32", device="cuda")


def test_a_device_that_is_too_small_for_the_model_is_left_out(
    golden: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = HostDevice(folder, capacity=1 << 22)
    monkeypatch.setattr("moss_jt.load.open_accelerator", lambda *_: device)
    monkeypatch.setattr("moss_jt.load.check_device", lambda _: None)
    model = golden / "tiny-int4" / "g32"
    assert load_model(model).device == "cpu"
    assert "give at least" in caplog.text and "The CPU computes." in caplog.text
    assert device.taken == 0
    for asked in ({"device": "cuda"}, {"vram": 1 << 22}, {"host_share": 0.5}):
        with pytest.raises(ConfigError, match="give at least"):
            load_model(model, compute="fast", **asked)
