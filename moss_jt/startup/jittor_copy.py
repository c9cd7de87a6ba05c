"""A private copy of the installed Jittor, so that all environments of a machine share one compiled core.

Jittor's cache depends on the folder that it is installed in, so each new venv would compile for minutes
again. The copy lies in a folder named after the content. Nothing in it is edited, and nothing in
site-packages is touched.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from contextlib import suppress
from importlib.metadata import Distribution
from pathlib import Path

_PACKAGES = ("jittor", "jittor_utils")
_PREFIX = ".new-"
_STALE_S = 3600


def copy_name(distribution: Distribution) -> str:
    """The name of the copy's folder: version and a hash of what the packages contain."""
    digest = hashlib.sha256()
    for line in _content_lines(distribution):
        digest.update(line.encode())
    return f"{distribution.version}-{digest.hexdigest()[:12]}"


def _content_lines(distribution: Distribution) -> list[str]:
    """`path,hash` of each file of the packages, from the installer's record, else from the files."""
    record = distribution.read_text("RECORD") or ""
    lines = [line for line in record.splitlines() if line.split("/")[0] in _PACKAGES and "sha256=" in line]
    return sorted(lines) or sorted(_hash_files(distribution))


def _hash_files(distribution: Distribution) -> list[str]:
    lines = []
    for package in _PACKAGES:
        root = Path(str(distribution.locate_file(package)))
        for file in sorted(root.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                lines.append(f"{file.relative_to(root.parent)},{hashlib.sha256(file.read_bytes()).hexdigest()}")
    return lines


def copy_packages(distribution: Distribution, target: Path) -> None:
    """Make the copy, unless it is there; several processes may do so at once."""
    if target.is_dir():
        return
    with staged(target) as stage:
        for package in _PACKAGES:
            source = Path(str(distribution.locate_file(package)))
            shutil.copytree(source, stage / package, ignore=shutil.ignore_patterns("__pycache__"))


class staged:
    """A new folder that appears under its name only when it is whole (a `with` block)."""

    def __init__(self, target: Path) -> None:
        self._target = target
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        self._stage = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=target.parent))

    def __enter__(self) -> Path:
        """The folder to fill."""
        return self._stage

    def __exit__(self, kind: object, *_: object) -> None:
        """Give the folder its name, or remove it after an error or when another process was faster."""
        try:
            if kind is None:
                self._stage.chmod(0o755)
                self._stage.rename(self._target)
        except OSError:
            if not self._target.is_dir():
                raise
        finally:
            shutil.rmtree(self._stage, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what killed processes left unfinished in a folder."""
    for left in folder.glob(f"{_PREFIX}*"):
        with suppress(FileNotFoundError):  # its maker has just finished
            if time.time() - left.stat().st_mtime > _STALE_S:
                shutil.rmtree(left, ignore_errors=True)
