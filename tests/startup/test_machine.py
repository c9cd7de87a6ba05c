"""What is asked of a machine, and the words where it is not there."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_machine import install_wheel

from moss_jt import paths
from moss_jt.errors import StartupError
from moss_jt.startup import machine


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("1.25.2", False),
        ("1.26.0", True),
        ("1.26.4", True),
        ("2.0.0", True),
        ("2.4.6", True),
        ("3.0.0", False),
        ("?", False),
    ],
)
def test_supported_numpys(version: str, supported: bool) -> None:
    assert machine.is_numpy_supported(version) is supported


def test_numpy_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", SimpleNamespace(__version__="1.24.3"))
    with pytest.raises(StartupError, match=r"numpy>=1\.26,<3 is needed \(others would give wrong numbers silently\)"):
        machine.require_numpy()
    with pytest.raises(StartupError, match=r"found 1\.24\.3: .* -m pip install 'numpy>=1\.26,<3'$"):
        machine.require_numpy()


def test_jittor_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(StartupError, match=r"Jittor 1\.3\.11\.0 is needed, none is installed .*'jittor==1\.3\.11\.0'$"):
        machine.require_jittor()


def test_jittor_of_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_wheel(tmp_path, "jittor", "1.3.9.2", {})
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(StartupError, match=r"Jittor 1\.3\.11\.0 is needed, found 1\.3\.9\.2: .*'jittor==1\.3\.11\.0'$"):
        machine.require_jittor()


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StartupError, match=r"found no g\+\+ on PATH: apt install g\+\+$"):
        machine.require_compiler()


def test_no_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "include_folders", lambda: [tmp_path])
    with pytest.raises(StartupError, match=rf"found no {tmp_path}/Python\.h: apt install python3[.\d]*-dev$"):
        machine.require_python_headers()


def test_home_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "ascii")
    with pytest.raises(StartupError, match=rf"the folder {tmp_path}/file/jittor must be writable .*set MOSS_JT_HOME"):
        machine.require_usable_home(tmp_path / "file" / "jittor")


def test_home_that_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # root may write anywhere, so chmod would prove nothing
    with pytest.raises(StartupError, match=r"must be writable .* found: Read-only file system; set MOSS_JT_HOME to"):
        machine.require_usable_home(tmp_path)


@pytest.mark.parametrize("name", ["my folder", "it's", 'a"b', "a$b", "a;b"])
def test_home_that_a_shell_cannot_spell(tmp_path: Path, name: str) -> None:
    with pytest.raises(StartupError, match=r"because of the character .*: set MOSS_JT_HOME to a folder without it"):
        machine.require_usable_home(tmp_path / name)
    assert not (tmp_path / name).exists()


def test_home_with_letters_of_any_script(tmp_path: Path) -> None:
    machine.require_usable_home(tmp_path / "模型-é")


def test_home_without_execution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC))
    with pytest.raises(StartupError, match="mounted noexec, where compiled code cannot run; set MOSS_JT_HOME"):
        machine.require_usable_home(tmp_path)


def test_home_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(StartupError, match="on a file system without locks, which Jittor needs; set MOSS_JT_HOME"):
        machine.require_usable_home(tmp_path)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(paths.HOME_VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", refuse)
    with pytest.raises(StartupError, match="no home folder: set MOSS_JT_HOME to a folder that you can write"):
        paths.home()


def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 1500 << 20)
    monkeypatch.setattr(machine, "logical_cores", lambda: 64)
    assert machine.memory_bytes()[1] <= 1500 << 20
    assert machine.compile_jobs() <= 2


def test_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100 << 20))
    with pytest.raises(
        StartupError, match=r"needs 1024 MiB of free disk in .*, found 100 MiB; make room or set MOSS_JT"
    ):
        machine.require_room(tmp_path / "not" / "there" / "yet")


def test_cores_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= machine.physical_cores() <= machine.logical_cores() <= (os.cpu_count() or 1)
    monkeypatch.setattr(machine, "_cgroup_cores", lambda: 1)
    assert machine.logical_cores() == 1


def test_siblings_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "allowed_cpus", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(machine, "_core_of", lambda cpu: f"{cpu % 2},{cpu % 2 + 2}")
    monkeypatch.setattr(machine, "_cgroup_cores", lambda: 64)
    assert machine.physical_cores() == 2
    assert machine.logical_cores() == 4


def test_jobs_follow_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "logical_cores", lambda: 16)
    monkeypatch.setattr(machine, "memory_bytes", lambda: (4 << 30, 2 << 30))
    assert machine.compile_jobs() == 2
    monkeypatch.setattr(machine, "memory_bytes", lambda: (4 << 30, 1 << 20))
    assert machine.compile_jobs() == 1
