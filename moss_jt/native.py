"""Code in C++ that needs neither Python nor Jittor: compiled once a machine and opened with ctypes.

Each source lies in `kernels/host/`; its library is kept beside Jittor's compiled code, in a folder named after
everything that it depends on. That folder appears when it is whole, so any number of processes may ask at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import re
import subprocess
from importlib import resources
from pathlib import Path

from moss_jt import paths
from moss_jt.errors import KernelError
from moss_jt.language import pick
from moss_jt.progress import Progress, Quiet
from moss_jt.startup import machine
from moss_jt.startup.jittor_copy import staged

_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra")
_LOCAL_INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
_TIMEOUT_S = 600


def load_library(name: str, progress: Progress | None = None) -> ctypes.CDLL:
    """Open the library made from `kernels/host/<name>.cpp`, compiling it the first time (a few seconds).

    A call of one of its functions lets other Python threads run meanwhile.

    Raises:
        StartupError: no compiler, or no folder to write to; the message names what mends it.
        KernelError: the source does not compile, or the library cannot be opened.
    """
    library = build_library(name, progress)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise KernelError(
            f"{library} cannot be opened: {error}. Delete the folder {library.parent}; it is made again."
        ) from error


def build_library(name: str, progress: Progress | None = None) -> Path:
    """Compile `kernels/host/<name>.cpp` unless that was done before; the errors are those of `load_library`."""
    sources = _sources(f"{name}.cpp")
    compiler = machine.require_compiler()
    home = paths.jittor_home()
    library = home / "native" / f"{name}-{_key(sources, compiler)}" / f"{name}.so"
    if not library.is_file():
        machine.require_usable_home(home)
        _compile(sources, compiler, library, Quiet() if progress is None else progress)
    return library


def _sources(file: str) -> dict[str, str]:
    """A source and the headers of ours that it includes: name -> text."""
    text = resources.files("moss_jt.kernels").joinpath("host").joinpath(file).read_text("utf-8")
    found = {file: text}
    for header in _LOCAL_INCLUDE.findall(text):
        found |= _sources(header)
    return found


def _key(sources: dict[str, str], compiler: Path) -> str:
    """A name for everything that the library depends on."""
    real = compiler.resolve()
    stat = real.stat()
    made_by = f"{real} {stat.st_size} {stat.st_mtime_ns} {platform.machine()} {' '.join(platform.libc_ver())}"
    return hashlib.sha256("\0".join((*sources.values(), made_by, *_FLAGS)).encode()).hexdigest()[:16]


def _compile(sources: dict[str, str], compiler: Path, library: Path, progress: Progress) -> None:
    name = library.stem
    progress.begin(pick(f"compiling the program {name} (once)", f"编译程序 {name}（仅首次）"), 1, "files")
    try:
        with staged(library.parent) as stage:
            for file, text in sources.items():
                (stage / file).write_text(text, "utf-8")
            _run([str(compiler), *_FLAGS, "-o", str(stage / library.name), str(stage / f"{name}.cpp")], name)
        progress.advance(1)
    except OSError as error:  # of the folder: the compiler's own failures have their words already
        raise KernelError(
            f"{library} cannot be written: {error}. {paths.HOME_VARIABLE} names another place."
        ) from error
    finally:
        progress.end()


def _run(command: list[str], name: str) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"{command[0]} did not run: {error}. `moss-jt doctor` checks the compiler.") from error
    if done.returncode != 0:
        raise KernelError(
            f"kernels/host/{name}.cpp does not compile with {command[0]}: {_reason(done.stderr)} "
            "`moss-jt doctor` checks the compiler."
        )


def _reason(report: str) -> str:
    """The line of a compiler's report that says what went wrong."""
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line.lower()]
    return (telling or lines or ["it gave no reason."])[0]
