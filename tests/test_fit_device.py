"""Plans for a device before there is one, and what its rates allow."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from host_device import HostDevice

from moss_jt.converters.synth import preset_config
from moss_jt.errors import ConfigError
from moss_jt.fit_device import DeviceRates, fit_device
from moss_jt.memory import GIB
from moss_jt.sharing import SharingRates

FULL = preset_config("moss-moon-003", bits=4, head_bits=8)


def test_int4_with_2048_tokens_fits_12_gib_and_streams_in_4() -> None:
    large = fit_device(FULL, vram=12 * GIB, memory=4 * GIB)
    assert large.plans.host is None and large.plans.device.context == 2048
    assert [step.link_bytes for step in large.steps] == [0, 0, 0]
    small = fit_device(FULL, vram=4 * GIB, memory=16 * GIB)
    assert small.plans.device.context == 2048
    assert 0 < small.steps[0].link_bytes < small.steps[1].link_bytes < small.steps[2].link_bytes
    assert [step.disk_bytes for step in small.steps] == [0, 0, 0]
    assert all(step.most_tokens_per_s is None for step in small.steps)


@pytest.mark.parametrize("vram_gib", [3, 4, 6, 8, 12])
@pytest.mark.parametrize("memory_gib", [1.5, 3, 6, 16])
def test_every_byte_is_somewhere(vram_gib: int, memory_gib: float) -> None:
    found = fit_device(FULL, vram=vram_gib * GIB, memory=int(memory_gib * GIB))
    device, host = found.plans.device, found.plans.host
    taken = device.needs.fixed + device.ring_bytes + device.resident_bytes + device.kv_bytes(1)
    assert taken <= vram_gib * GIB
    if host is not None:
        assert host.needs.fixed + host.ring_bytes + host.resident_bytes <= memory_gib * GIB
    for before, after in zip(found.steps, found.steps[1:], strict=False):
        assert before.link_bytes <= after.link_bytes and before.disk_bytes <= after.disk_bytes
        assert after.disk_bytes <= after.link_bytes
        assert before.device_bytes + before.link_bytes == after.device_bytes + after.link_bytes


def test_too_little_is_told() -> None:
    with pytest.raises(ConfigError, match="on the device, 600MiB of memory is too little"):
        fit_device(FULL, vram=600 << 20)
    with pytest.raises(ConfigError, match='kv is "fp8"; known are'):
        fit_device(FULL, vram=8 * GIB, kv="fp8")


def test_a_device_that_is_here_is_measured(tmp_path: Path, jittor: ModuleType) -> None:
    """So is the processor beside its link, for weights that it could multiply."""
    device = HostDevice(tmp_path, capacity=64 << 20)
    config = preset_config("tiny", bits=4)
    found = fit_device(config, vram=device.own_bytes + device.capacity, device=device)
    assert found.rates is not None and found.rates.link > 0 and found.rates.memory > 0
    assert found.rates.sharing is not None and found.rates.sharing.host > 0 and found.rates.sharing.turn_s > 0
    assert all(step.most_tokens_per_s for step in found.steps)
    assert device.taken == 0 and not device.pinned
    exact = fit_device(config, vram=1 << 26, compute="exact", device=HostDevice(tmp_path, capacity=64 << 20))
    assert exact.rates is not None and exact.rates.sharing is None


SHARING = SharingRates(link=20e9, link_beside=15e9, host=30e9, host_beside=25e9, turn_s=0.0)


def at_rates(monkeypatch: pytest.MonkeyPatch, sharing: SharingRates | None) -> None:
    """Let every device have 1 TB/s of memory and a link of 20 GB/s."""
    monkeypatch.setattr("moss_jt.fit_device.measure", lambda *_: DeviceRates(1e12, 20e9, sharing))


def test_the_share_that_pays_and_what_it_brings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    at_rates(monkeypatch, SHARING)
    found = fit_device(FULL, vram=6 * GIB, memory=16 * GIB, device=HostDevice(tmp_path))
    assert found.host_share == found.to_dict()["host_share"] == pytest.approx(0.625)
    for step in found.steps:
        assert step.most_tokens_per_s is not None and step.most_shared_tokens_per_s is not None
        assert step.most_tokens_per_s == pytest.approx(20e9 / step.link_bytes)
        # two thirds of the weights of a layer are in products that take half the time now; the head is copied
        assert step.most_shared_tokens_per_s == pytest.approx(step.most_tokens_per_s * 3 / 2, rel=0.06)


@pytest.mark.parametrize(
    ("vram_gib", "memory_gib", "sharing", "share"),
    [
        (12, 16, SHARING, None),  # nothing is copied
        (6, 16, None, None),  # nothing is measured
        (6, 16, SharingRates(20e9, 5e9, 10e9, 10e9, 0.0), 0.0),  # the link loses what the processor gains
        (4, 1.5, SHARING, None),  # the last rows of all matrices come from the disk
    ],
)
def test_where_the_host_gets_nothing(
    vram_gib: int,
    memory_gib: float,
    sharing: SharingRates | None,
    share: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_rates(monkeypatch, sharing)
    device = HostDevice(Path("unused"))
    found = fit_device(FULL, vram=vram_gib * GIB, memory=int(memory_gib * GIB), device=device)
    assert found.host_share == share
    assert [step.most_shared_tokens_per_s for step in found.steps] == [None] * 3
