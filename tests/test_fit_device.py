"""Plans for a device before there is one, and what its rates allow."""

from __future__ import annotations

from pathlib import Path

import pytest
from host_device import HostDevice

from moss_jt.converters.synth import preset_config
from moss_jt.errors import ConfigError
from moss_jt.fit_device import fit_device
from moss_jt.memory import GIB

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


def test_a_device_that_is_here_is_measured(tmp_path: Path) -> None:
    device = HostDevice(tmp_path, capacity=64 << 20)
    config = preset_config("tiny", bits=4)
    found = fit_device(config, vram=device.own_bytes + device.capacity, device=device)
    assert found.rates is not None and found.rates.link > 0 and found.rates.memory > 0
    assert all(step.most_tokens_per_s for step in found.steps)
    assert device.taken == 0 and not device.pinned
