"""Which device is taken, with a driver that says what the test wants."""

from __future__ import annotations

import importlib.util
import logging
import sys
from types import ModuleType
from typing import Any

import pytest

from moss_jt import accelerator
from moss_jt.accelerator import open_accelerator
from moss_jt.errors import ConfigError, KernelError
from moss_jt.startup.gpu import Driver, Gpu

OLD = Gpu("GeForce GTX 1080", 8 << 30, (6, 1))
SMALL = Gpu("GeForce RTX 3050", 4 << 30, (8, 6))
LARGE = Gpu("GeForce RTX 4090", 24 << 30, (8, 9))
NONE = Driver(problem="the CUDA driver sees no device")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What would have been opened; cupy is there."""
    calls: list[tuple[Any, ...]] = []
    module = ModuleType("moss_jt.kernels.cupy_device")
    module.CupyDevice = lambda *arguments: calls.append(arguments)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "moss_jt.kernels.cupy_device", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    return calls


def driver(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu) -> None:
    found = Driver((13, 0), gpus) if gpus else NONE
    monkeypatch.setattr(accelerator, "ask_driver", lambda: found)


@pytest.mark.parametrize(
    ("name", "gpus", "index"),
    [
        ("auto", [OLD, SMALL, LARGE], 2),
        ("auto", [SMALL, SMALL], 0),
        ("cuda", [OLD, SMALL], 1),
        ("cuda:1", [LARGE, SMALL], 1),
    ],
)
def test_the_largest_that_can_be_used(
    name: str, gpus: list[Gpu], index: int, opened: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(monkeypatch, *gpus)
    open_accelerator(name, 5 << 30)
    assert opened == [(index, 5 << 30, None)]


@pytest.mark.parametrize(("name", "gpus"), [("cpu", [LARGE]), ("auto", [])])
def test_no_device_is_wanted_or_there(
    name: str, gpus: list[Gpu], opened: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(monkeypatch, *gpus)
    assert open_accelerator(name) is None
    assert not opened


def test_auto_says_why_it_does_not_take_a_card(
    opened: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    driver(monkeypatch, OLD)
    with caplog.at_level(logging.WARNING):
        assert open_accelerator("auto") is None
    assert (
        "GTX 1080 (compute capability 6.1) is too old: our CUDA kernels need 7.5 or newer. The CPU computes."
        in caplog.text
    )
    assert not opened


def test_auto_without_cupy(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    driver(monkeypatch, LARGE)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert open_accelerator("auto") is None
    assert "-m pip install 'cupy-cuda13x'" in caplog.text
    with pytest.raises(KernelError, match="need cupy, which is not installed"):
        open_accelerator("cuda")


def test_auto_goes_on_without_a_device_that_cannot_be_opened(
    opened: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: object) -> None:
        raise KernelError("CUDA device 0 cannot be used: there is no NVRTC.")

    driver(monkeypatch, LARGE)
    monkeypatch.setattr(sys.modules["moss_jt.kernels.cupy_device"], "CupyDevice", failing)
    with caplog.at_level(logging.WARNING):
        assert open_accelerator("auto") is None
    assert "there is no NVRTC. The CPU computes." in caplog.text
    with pytest.raises(KernelError, match="there is no NVRTC"):
        open_accelerator("cuda")


@pytest.mark.parametrize(
    ("name", "gpus", "kind", "words"),
    [
        ("cuda", [], KernelError, "no CUDA device can be used: the CUDA driver sees no device"),
        ("cuda:0", [OLD], KernelError, "is too old"),
        ("cuda:3", [LARGE], KernelError, "there is no CUDA device 3; the driver sees 1"),
        ("rocm", [LARGE], ConfigError, 'device is "rocm"; known are'),
        ("cuda:-1", [LARGE], ConfigError, 'device is "cuda:-1"'),
    ],
)
def test_what_was_asked_for_by_name_must_be_there(  # noqa: PLR0917
    name: str, gpus: list[Gpu], kind: type[Exception], words: str, opened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(monkeypatch, *gpus)
    with pytest.raises(kind, match=words):
        open_accelerator(name)
    assert not opened
