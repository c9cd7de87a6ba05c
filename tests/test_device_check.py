"""A device that computes wrong is found out before a model is trusted to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from host_device import HostDevice

from moss_jt.device_check import check_device
from moss_jt.errors import KernelError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("device")


def test_a_device_that_computes_right(folder: Path) -> None:
    device = HostDevice(folder)
    check_device(device)
    assert device.taken == 0, "all memory is given back"


def test_what_is_captured_is_replayed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = HostDevice(folder)
    monkeypatch.setattr(device, "replay", lambda _graph: None)
    with pytest.raises(KernelError, match="the host computes wrong"):
        check_device(device)


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("attend", "with 4-bit weights and inputs in float32"),
        ("halves_int8_8", "with 8-bit weights and inputs in float16"),
        ("bytes_int8_8", "with 8-bit weights and inputs in int8"),
        ("bytes_int4_many", "with 4-bit weights and inputs in int8"),
        ("bytes_int4_16", "with 4-bit weights and inputs in int8"),
        ("halves_int8_16", "with 8-bit weights and inputs in float16"),
        ("halves_float16_16", "with 16-bit weights and inputs in float16"),
        ("rows_float16", "with 16-bit weights and inputs in float32"),
        ("halves_float16_many", "with 16-bit weights and inputs in float16"),
        ("halves_float16_8", "with 16-bit weights and inputs in float16"),
        ("attend_half_32", "with 4-bit weights and inputs in float16"),
        ("attend_half_8", "with 4-bit weights and inputs in float16"),
        ("attend_int8_32", "with 4-bit weights and inputs in int8"),
        ("attend_int8_8", "with 4-bit weights and inputs in int8"),
    ],
)
def test_a_kernel_that_does_nothing_is_found(
    kernel: str, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = HostDevice(folder)
    launch = device.launch

    def broken(source: str, name: str, *rest: Any) -> None:
        if name != kernel:
            launch(source, name, *rest)

    monkeypatch.setattr(device, "launch", broken)
    with pytest.raises(KernelError, match=f"the host computes wrong: {words}"):
        check_device(device)
