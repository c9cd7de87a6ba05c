"""oneDNN for Jittor's matrix products, from the PyPI wheels onednn-cpu-gomp and onednn-devel-cpu-gomp.

Release 2021.2.0 of the wheels is oneDNN 2.2.0, exactly what Jittor 1.3.11 would download. Jittor looks for
it in a fixed folder of its home; we put it there, so it never asks the network. The library is hard-linked
or copied, not symlinked: the venv that it came from may be removed while other venvs use the compiled code.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from moss_jt.startup.jittor_copy import staged

VERSION = "2021.2.0"
REQUIREMENTS = (f"onednn-cpu-gomp=={VERSION}", f"onednn-devel-cpu-gomp=={VERSION}")
_FOLDER = "dnnl_lnx_2.2.0_cpu_gomp"  # the name that Jittor 1.3.11 looks for
_LIBRARY = "libdnnl.so.2"
_NAMES = ("libmkldnn.so", "libdnnl.so")
_HEADER = "mkldnn.hpp"


@dataclass(frozen=True)
class OneDnn:
    """The installed wheels' files."""

    library: Path
    include: Path


def find_onednn() -> OneDnn | None:
    """The files of the installed wheels, None where one is missing or of another version."""
    if platform.machine() != "x86_64":
        return None
    library, header = _file_of("onednn-cpu-gomp", _LIBRARY), _file_of("onednn-devel-cpu-gomp", _HEADER)
    if library is None or header is None:
        return None
    return OneDnn(library, header.parent)


def _file_of(distribution: str, name: str) -> Path | None:
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    if found.version != VERSION:
        return None
    for entry in found.files or ():
        if entry.name == name:
            path = Path(str(found.locate_file(entry))).resolve()
            return path if path.is_file() else None
    return None


def folder_in(jittor_home: Path) -> Path:
    """Where Jittor with this home looks for oneDNN."""
    return jittor_home / ".cache" / "jittor" / "mkl" / _FOLDER


def is_linked(jittor_home: Path) -> bool:
    """Whether the folder is whole (a dangling link is not)."""
    folder = folder_in(jittor_home)
    return (
        all((folder / "lib" / name).is_file() for name in (_LIBRARY, *_NAMES))
        and (folder / "include" / _HEADER).is_file()
    )


def link_onednn(found: OneDnn, jittor_home: Path) -> None:
    """Put the files where Jittor looks for them; mends a folder that is not whole."""
    if is_linked(jittor_home):
        return
    folder = folder_in(jittor_home)
    if folder.is_dir():
        shutil.rmtree(folder)
    with staged(folder) as stage:
        lib = stage / "lib"
        lib.mkdir()
        _link_or_copy(found.library, lib / _LIBRARY)
        for name in _NAMES:
            (lib / name).symlink_to(_LIBRARY)
        _copy_headers(found.include, stage / "include")


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _copy_headers(source: Path, target: Path) -> None:
    target.mkdir()
    for file in sorted(source.iterdir()):  # the venv's include folder holds other packages' headers too
        if file.is_file() and file.name.startswith(("dnnl", "mkldnn")):
            shutil.copyfile(file, target / file.name)
    shutil.copytree(source / "oneapi", target / "oneapi")
