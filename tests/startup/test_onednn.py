"""oneDNN put where Jittor looks for it, from stand-ins of the wheels."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from fake_machine import install_wheel

from moss_jt.startup import onednn


@pytest.fixture
def venv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A venv with both wheels, which put their files outside of the packages' folder."""
    site = tmp_path / "venv" / "site"
    monkeypatch.setattr(sys, "path", [str(site)])
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    return tmp_path / "venv"


def install(venv: Path, version: str = onednn.VERSION) -> None:
    install_wheel(venv / "site", "onednn-cpu-gomp", version, {"../lib/libdnnl.so.2": "library"})
    headers = {"../include/mkldnn.hpp": "h", "../include/oneapi/dnnl/dnnl.h": "h", "../include/other.h": "h"}
    install_wheel(venv / "site", "onednn-devel-cpu-gomp", version, headers)


def test_nothing_installed(venv: Path) -> None:
    assert onednn.find_onednn() is None


def test_another_version_is_not_taken(venv: Path) -> None:
    install(venv, "2024.0.0")
    assert onednn.find_onednn() is None


def test_another_processor(venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(venv)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert onednn.find_onednn() is None


def test_files_outlive_the_venv(venv: Path, tmp_path: Path) -> None:
    install(venv)
    found = onednn.find_onednn()
    assert found is not None
    home = tmp_path / "home"
    onednn.link_onednn(found, home)
    shutil.rmtree(venv)
    folder = home / ".cache" / "jittor" / "mkl" / "dnnl_lnx_2.2.0_cpu_gomp"
    assert (folder / "lib" / "libmkldnn.so").read_text("ascii") == "library"
    assert (folder / "lib" / "libdnnl.so.2").read_text("ascii") == "library"
    assert (folder / "include" / "oneapi" / "dnnl" / "dnnl.h").is_file()
    assert not (folder / "include" / "other.h").exists()
    assert onednn.is_linked(home)


def test_other_file_system_means_a_copy(venv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(venv)

    def refuse(*_: object) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr("os.link", refuse)
    found = onednn.find_onednn()
    assert found is not None
    onednn.link_onednn(found, tmp_path / "home")
    assert onednn.is_linked(tmp_path / "home")


def test_dangling_links_are_mended(venv: Path, tmp_path: Path) -> None:
    install(venv)
    found = onednn.find_onednn()
    assert found is not None
    lib = onednn.folder_in(tmp_path / "home") / "lib"
    lib.mkdir(parents=True)
    (lib / "libmkldnn.so").symlink_to(tmp_path / "removed")
    assert not onednn.is_linked(tmp_path / "home")
    onednn.link_onednn(found, tmp_path / "home")
    assert (lib / "libmkldnn.so").is_file()
