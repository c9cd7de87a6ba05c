"""The models under `paths.models_dir()`: their names, and finding, listing and removing them.

A model NAME has a folder of that name ("/" written as "--"), which appears when it is whole. Beside
it may lie NAME.pull (a pull that is not finished), NAME.source (the original files, kept when asked),
NAME.removed (a removal that was interrupted) and .NAME.partial (a conversion that is not finished).
What `load` converts on the fly lies in the folder "converted" and is named converted/FOLDER.
Nothing here touches a path outside models_dir().
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moss_jt import paths
from moss_jt.checkpoint import is_native
from moss_jt.config import MossConfig
from moss_jt.errors import ConfigError, DiskError, HubError

PULL_SUFFIX = ".pull"
SOURCE_SUFFIX = ".source"
REMOVED_SUFFIX = ".removed"
CONVERTED = "converted"
CONVERSION_SUFFIX = ".partial"  # after a dot: made by converters.journal
SUFFIXES = (PULL_SUFFIX, SOURCE_SUFFIX, REMOVED_SUFFIX)
ORIGIN_FILE = "origin.json"  # in the model's folder: where it came from
LOCK_FILE = "lock"

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
_NAME = re.compile(rf"{_PART}(/{_PART})?(@{_PART}(/{_PART})*)?")
_FLOAT_BITS = {"float16": 16, "bfloat16": 16, "float32": 32}


@dataclass(frozen=True)
class StoredModel:
    """What is known of a stored model.

    Attributes:
        name: as `--model` takes it.
        path: the folder of the whole model; missing while it is partial.
        parts: every folder (or file) that belongs to it.
        state: "complete", or "partial" where a pull or conversion has not finished.
        bits: 4, 8, 16 or 32 per weight; None where its config.json does not say.
        size_bytes: what all parts take up on the disk.
        last_used: seconds since the epoch.
    """

    name: str
    path: Path
    parts: tuple[Path, ...]
    state: Literal["complete", "partial"]
    bits: int | None
    size_bytes: int
    last_used: float

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "name": self.name,
            "path": str(self.path),
            "state": self.state,
            "bits": self.bits,
            "size_bytes": self.size_bytes,
            "last_used": self.last_used,
        }


def is_model_name(text: str) -> bool:
    """Whether this can be the name of a model: NAME, OWNER/NAME, with @REVISION or not."""
    owner, _, folder = text.partition("/")
    if owner == CONVERTED:  # whatever the converted folder was called
        return bool(folder) and folder.isprintable() and not folder.startswith(".") and "/" not in folder
    well_formed = _NAME.fullmatch(text) is not None and text != CONVERTED
    return well_formed and ".." not in text and not text.endswith((*SUFFIXES, CONVERSION_SUFFIX, ".git"))


def folder_of(name: str) -> Path:
    """Where the model of this name lies, or would lie.

    Raises:
        HubError: it is not a name.
    """
    if not is_model_name(name):
        raise HubError(
            f"{name!r} is not the name of a model. A name is OWNER/NAME or NAME, of letters, digits and . _ -, "
            "for example fnlp/moss-moon-003-sft-int4."
        )
    owner, _, rest = name.partition("/")
    if owner == CONVERTED:
        return paths.models_dir() / CONVERTED / rest
    return paths.models_dir() / name.replace("/", "--")


def list_models() -> list[StoredModel]:
    """Every stored model, whole or not, by name."""
    groups: dict[Path, list[Path]] = {}
    for folder in (paths.models_dir(), paths.models_dir() / CONVERTED):
        for entry in _entries(folder):
            if entry != paths.models_dir() / CONVERTED:
                groups.setdefault(folder / _base_of(entry.name), []).append(entry)
    return sorted((_describe(model, parts) for model, parts in groups.items()), key=lambda model: model.name)


def find_model(name: str) -> StoredModel | None:
    """The stored model of this name, whole or not.

    Raises:
        HubError: it is not a name.
    """
    folder = folder_of(name)
    parts = [part for part in _entries(folder.parent) if _base_of(part.name) == folder.name]
    return _describe(folder, parts) if parts else None


def get_model(name: str) -> StoredModel:
    """The stored model of this name, whole or not.

    Raises:
        HubError: there is none.
    """
    model = find_model(name)
    if model is None:
        raise HubError(f"{name} is not stored (stored: {names()}). Fetch it with: moss-jt pull {name}")
    return model


def path_of(name: str) -> Path:
    """The folder of a stored model.

    Raises:
        HubError: it is not stored, or not whole.
    """
    model = get_model(name)
    if model.state == "complete":
        return model.path
    if beside(model.path, PULL_SUFFIX) in model.parts:
        raise HubError(f"{name} is stored only in part. Go on where it stopped with: moss-jt pull {name}")
    raise HubError(
        f"the making of {name} has not finished. Repeat the command that makes it, or remove it with: "
        f"moss-jt models rm {name}"
    )


def remove_model(name: str) -> int:
    """Delete a stored model with everything that belongs to it.

    Returns:
        The bytes that this frees.

    Raises:
        HubError: there is none of that name, or it is being pulled.
        DiskError: something cannot be deleted.
    """
    model = get_model(name)
    work = beside(model.path, PULL_SUFFIX)
    with lock(work, name) if work.is_dir() else contextlib.nullcontext():
        doomed = beside(model.path, REMOVED_SUFFIX)
        for part in model.parts:
            _delete(part, doomed)
        _delete(doomed, doomed)
    return model.size_bytes


def mark_used(path: Path) -> None:
    """Note that a model is used now; not where the folder is read-only."""
    with contextlib.suppress(OSError):
        os.utime(path)


def beside(folder: Path, suffix: str) -> Path:
    """The folder that belongs to a model's folder under a suffix."""
    return folder.with_name(folder.name + suffix)


@contextlib.contextmanager
def lock(work: Path, name: str) -> Iterator[None]:
    """Hold the folder of an unfinished pull; it must exist.

    Raises:
        HubError: another process holds it.
    """
    with (work / LOCK_FILE).open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HubError(f"{name} is being pulled by another process. Wait for it, or stop it first.") from None
        yield


def size_on_disk(path: Path) -> int:
    """Bytes that a file or folder takes up, following no links."""
    try:
        total = path.lstat().st_blocks * 512
        if path.is_dir() and not path.is_symlink():
            total += sum(size_on_disk(child) for child in path.iterdir())
    except (FileNotFoundError, PermissionError):  # renamed meanwhile by a pull, or not ours to see
        return 0
    return total


def names() -> str:
    """What is stored, for an error."""
    return ", ".join(model.name for model in list_models()) or "nothing"


def _entries(folder: Path) -> list[Path]:
    """What lies in the folder of all models."""
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_dir() or entry.is_symlink())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DiskError(
            f"{folder} cannot be read: {error.strerror}. Set {paths.HOME_VARIABLE} to a folder of yours."
        ) from error


def _base_of(entry: str) -> str:
    """The name of the model's folder to which an entry of models_dir() belongs."""
    if entry.startswith(".") and entry.endswith(CONVERSION_SUFFIX):
        return entry[1:].removesuffix(CONVERSION_SUFFIX)
    for suffix in SUFFIXES:
        entry = entry.removesuffix(suffix)
    return entry


def _describe(folder: Path, parts: list[Path]) -> StoredModel:
    """Look at what is there of one model."""
    whole = is_native(folder)
    shown = folder if whole else parts[0]
    return StoredModel(
        name=_name_of(folder),
        path=folder,
        parts=tuple(parts),
        state="complete" if whole else "partial",
        bits=_bits_of(folder if whole else beside(folder, PULL_SUFFIX) / "source"),
        size_bytes=sum(size_on_disk(part) for part in parts),
        last_used=shown.lstat().st_mtime,
    )


def _name_of(folder: Path) -> str:
    """The name that was asked for when the model was pulled; else the folder's."""
    if folder.parent != paths.models_dir():
        return f"{CONVERTED}/{folder.name}"
    plain = folder.name.replace("--", "/")
    try:
        name = json.loads((folder / ORIGIN_FILE).read_text("utf-8"))["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return plain
    return name if isinstance(name, str) and name.replace("/", "--") == folder.name else plain


def _bits_of(folder: Path) -> int | None:
    """Bits of a weight, as far as config.json tells."""
    try:
        config = MossConfig.from_file(folder / "config.json")
    except ConfigError:
        return None
    if config.quantization is not None:
        return config.quantization.bits
    return _FLOAT_BITS.get(config.dtype or "")


def _delete(path: Path, doomed: Path) -> None:
    """Delete a folder by way of another name: half a model must never be taken for a whole one."""
    try:
        if path != doomed:
            _delete(doomed, doomed)
            path.rename(doomed)
        if doomed.is_symlink() or doomed.is_file():
            doomed.unlink()  # never what a link points at
        elif doomed.is_dir():
            shutil.rmtree(doomed)
    except OSError as error:
        raise DiskError(
            f"{error.filename or path} cannot be deleted: {error.strerror}. Check its permissions."
        ) from error
