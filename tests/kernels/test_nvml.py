"""What NVML says, through a stand-in for its library."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from moss_jt.kernels import nvml


class FakeNvml:
    """Answers like libnvidia-ml.so.1."""

    def __init__(self, *, fails: str = "") -> None:
        self.fails, self.open = fails, 0
        self.asked: list[bytes] = []

    def nvmlInit_v2(self) -> int:
        self.open += 1
        return int(self.fails == "init")

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus: bytes, handle: Any) -> int:
        self.asked.append(bus)
        handle._obj.value = 7
        return int(self.fails == "handle")

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, found: Any) -> int:
        assert handle.value == 7
        found._obj.total, found._obj.free, found._obj.used = 1000, 300, 700
        return int(self.fails == "memory")


def test_used_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeNvml()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert nvml.used_memory("0000:01:00.0") == 700
    assert library.asked == [b"0000:01:00.0"] and library.open == 0


@pytest.mark.parametrize("fails", ["init", "handle", "memory"])
def test_nvml_that_does_not_answer(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeNvml(fails=fails))
    assert nvml.used_memory("0000:01:00.0") is None


def test_no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert nvml.used_memory("0000:01:00.0") is None
