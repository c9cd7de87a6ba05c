"""Native code is compiled once, by any number of processes, and its errors have words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moss_jt import native, paths
from moss_jt.errors import KernelError, StartupError

GOOD = 'extern "C" int answer() { return 42; }\n'


def use_source(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(native, "_sources", lambda file: {file: text})


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home where nothing is compiled yet."""
    monkeypatch.setenv(paths.HOME_VARIABLE, str(tmp_path / "home"))
    return tmp_path / "home"


def made(home: Path) -> list[str]:
    return sorted(file.name for file in (home / "jittor" / "native").iterdir())


def test_compiles_once(monkeypatch: pytest.MonkeyPatch, empty_home: Path) -> None:
    use_source(monkeypatch, GOOD)
    assert native.load_library("some").answer() == 42
    library = native.build_library("some")
    before = library.stat().st_mtime_ns
    assert native.build_library("some").stat().st_mtime_ns == before
    assert made(empty_home) == [library.parent.name]


def test_another_source_is_another_library(monkeypatch: pytest.MonkeyPatch, empty_home: Path) -> None:
    use_source(monkeypatch, GOOD)
    native.build_library("some")
    use_source(monkeypatch, GOOD.replace("42", "43"))
    assert native.load_library("some").answer() == 43
    assert len(made(empty_home)) == 2


def test_sources_hold_the_headers_they_include() -> None:
    assert set(native._sources("reader.cpp")) == {"reader.cpp", "blocks.h"}


def test_two_processes_at_once(empty_home: Path) -> None:
    code = (
        "import sys; from moss_jt import native; native._sources = lambda file: {file: sys.argv[1]};"
        "print(native.load_library('some').answer())"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", code, GOOD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for child in children:
        out, err = child.communicate(timeout=120)
        assert (child.returncode, out.strip()) == (0, "42"), err
    assert len(made(empty_home)) == 1


def test_what_does_not_compile_says_where(monkeypatch: pytest.MonkeyPatch, empty_home: Path) -> None:
    use_source(monkeypatch, "int f() {\n    return nowhere;\n}\n")
    with pytest.raises(
        KernelError, match=r"kernels/host/some\.cpp does not compile .*some\.cpp:2:.*nowhere.*doctor"
    ) as told:
        native.load_library("some")
    assert "\n" not in str(told.value)
    assert made(empty_home) == []


def test_a_compiler_that_cannot_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "g++"
    broken.write_text("not a program", "utf-8")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    use_source(monkeypatch, GOOD)
    with pytest.raises(KernelError, match=r"g\+\+ did not run.*doctor"):
        native.load_library("some")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StartupError, match=r"no g\+\+ on PATH: apt install"):
        native.load_library("reader")


def test_a_broken_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    use_source(monkeypatch, GOOD)
    library = native.build_library("some")
    os.truncate(library, 100)
    with pytest.raises(KernelError, match=rf"{library} cannot be opened: .* Delete the folder {library.parent}"):
        native.load_library("some")


def test_no_room_for_the_library(monkeypatch: pytest.MonkeyPatch, empty_home: Path) -> None:
    (empty_home / "jittor").mkdir(parents=True)
    (empty_home / "jittor" / "native").write_text("a file where a folder should be", "utf-8")
    use_source(monkeypatch, GOOD)
    with pytest.raises(KernelError, match=r"cannot be written: .*MOSS_JT_HOME"):
        native.load_library("some")
