"""A device that computes wrong is found out before a model is trusted to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from host_device import HostDevice

from moss_jt.device_check import check_device, check_way
from moss_jt.errors import KernelError
from moss_jt.shortlist import FOUND
from moss_jt.workspace import Inputs


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
    ("kernel", "bits", "inputs"),
    [
        ("attend", 4, "float32"),
        ("attend_half_32", 4, "float16"),
        ("attend_half_8", 4, "float16"),
        ("attend_int8_32", 4, "int8"),
        ("attend_int8_8", 4, "int8"),
        ("bytes_int4_many", 4, "int8"),
        ("bytes_int4_16", 4, "int8"),
        ("halves_int8_16", 8, "float16"),
        ("halves_int8_8", 8, "float16"),
        ("bytes_int8_8", 8, "int8"),
        ("rows_float16", 16, "float32"),
        ("halves_float16_many", 16, "float16"),
        ("halves_float16_16", 16, "float16"),
        ("halves_float16_8", 16, "float16"),
    ],
)
def test_a_kernel_that_does_nothing_is_found(
    kernel: str, bits: int, inputs: Inputs, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = HostDevice(folder)
    launch = device.launch

    def broken(source: str, name: str, *rest: Any) -> None:
        if name != kernel:
            launch(source, name, *rest)

    monkeypatch.setattr(device, "launch", broken)
    with pytest.raises(KernelError, match=f"the host computes wrong: with {bits}-bit weights and inputs in {inputs}"):
        check_way(device, bits, inputs)


@pytest.mark.parametrize("what", ["ids", "scores", "mass"])
def test_candidates_that_are_not_the_best_are_found(what: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = HostDevice(folder)
    read = device.read

    def broken(place: Any, into: npt.NDArray[Any]) -> None:
        read(place, into)
        if into.dtype == FOUND:
            into[what] = into[what][..., ::-1] if what == "ids" else into[what] * np.float32(1.01)

    monkeypatch.setattr(device, "read", broken)
    with pytest.raises(
        KernelError, match="with 4-bit weights and inputs in float32 the best of its logits are not found"
    ):
        check_way(device, 4, "float32")
