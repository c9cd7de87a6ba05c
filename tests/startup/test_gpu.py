"""What the CUDA driver says, from stand-ins of the driver."""

from __future__ import annotations

import pytest
from fake_machine import FakeCuda

from moss_jt.startup import gpu


def ask(monkeypatch: pytest.MonkeyPatch, library: object) -> gpu.Driver:
    monkeypatch.setattr(gpu, "_load", lambda: library)
    return gpu.ask_driver()


def test_devices_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ask(monkeypatch, FakeCuda(("Card A", 8 << 30, (8, 6)), ("Card B", 80 << 30, (9, 0)), version=12040))
    assert found.problem is None
    assert found.version == (12, 4)
    assert found.version_text == "12.4"
    assert found.gpus == (gpu.Gpu("Card A", 8 << 30, (8, 6)), gpu.Gpu("Card B", 80 << 30, (9, 0)))
    assert found.gpus[1].sm == "sm_90"


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(monkeypatch, None).problem == "no CUDA driver (libcuda.so.1) on this machine"


def test_driver_without_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(monkeypatch, FakeCuda()).problem == "the CUDA driver sees no device"


def test_driver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ask(monkeypatch, FakeCuda(("Card", 1, (9, 0)), init=100))
    assert found.problem == "the CUDA driver answers no device (cuInit gives error 100)"
    assert found.version == (13, 0)


def test_library_without_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(monkeypatch, object()).problem == "the CUDA driver answers no device (cuDriverGetVersion is missing)"


@pytest.mark.parametrize(
    ("capability", "supported"), [((7, 0), False), ((7, 5), True), ((9, 0), True), ((12, 0), True)]
)
def test_oldest_capability(capability: tuple[int, int], supported: bool) -> None:
    assert gpu.Gpu("Card", 1, capability).is_supported is supported
