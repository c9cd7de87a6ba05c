"""CUDA toolkits and wheels, found among stand-ins."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from fake_machine import install_wheel, make_script, make_toolkit

from moss_jt.startup import toolkit


def test_inspect_nvcc_follows_a_wrapper_script(tmp_path: Path) -> None:
    real = make_toolkit(tmp_path / "cuda-12.4", "12.4")
    wrapper = make_script(tmp_path / "bin" / "nvcc", f'#!/bin/sh\nexec {real} "$@"\n')
    assert toolkit.inspect_nvcc(wrapper) == toolkit.Toolkit(real, tmp_path / "cuda-12.4", (12, 4))


def test_inspect_nvcc_that_is_none(tmp_path: Path) -> None:
    assert toolkit.inspect_nvcc(tmp_path / "nvcc") is None
    assert toolkit.inspect_nvcc(make_script(tmp_path / "broken", "#!/bin/sh\nexit 1\n")) is None
    assert toolkit.inspect_nvcc(make_script(tmp_path / "nonsense", "no script at all")) is None


def test_newest_toolkit_that_the_driver_serves() -> None:
    found = [toolkit.Toolkit(Path(f"/{r}/bin/nvcc"), Path(f"/{r}"), (r, 0)) for r in (14, 13, 12, 10)]
    chosen = {major: toolkit.choose_toolkit(found, major) for major in (10, 11, 12, 13, 14)}
    assert {major: one and one.version[0] for major, one in chosen.items()} == {
        10: None,
        11: None,
        12: 12,
        13: 13,
        14: 13,
    }


def test_cuda_home_variable_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = make_toolkit(tmp_path / "mine", "11.8")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "mine"))
    assert nvcc in [found.nvcc for found in toolkit.find_toolkits()]


def test_wheels_of_cuda_13_share_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia" / "cu13").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert toolkit.wheel_folders(13) == [tmp_path / "nvidia" / "cu13"]
    assert toolkit.wheel_folders(12) == []


def test_wheels_of_cuda_11_and_12_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_wheel(tmp_path, "nvidia-cublas-cu12", "12.1", {"nvidia/cublas/include/cublas_v2.h": ""})
    install_wheel(tmp_path, "nvidia-cuda-runtime-cu11", "11.8", {"nvidia/cuda_runtime/include/cuda_runtime.h": ""})
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert toolkit.wheel_folders(12) == [tmp_path / "nvidia" / "cublas"]
    assert toolkit.wheel_folders(11) == [tmp_path / "nvidia" / "cuda_runtime"]


def test_wheel_names() -> None:
    assert toolkit.wheel_names(13, ["cublas"]) == ["nvidia-cublas"]
    assert toolkit.wheel_names(12, ["cublas", "curand"]) == ["nvidia-cublas-cu12", "nvidia-curand-cu12"]
