"""The source of a conversion while it is being used up: files may still be arriving, and may be deleted."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from moss_jt.checked_file import CheckedFile
from moss_jt.converters.holes import mark_of
from moss_jt.converters.native_source import open_native
from moss_jt.converters.source import Source, open_source
from moss_jt.converters.weight_files import find_weight_files
from moss_jt.errors import CheckpointError, ConfigError, DiskError

Arrive = Callable[[Path], None]

_EDGE_BYTES = 1 << 20  # of a file's start and end, enough to know it again
INDEX_FILES = {".safetensors": "model.safetensors.index.json", ".bin": "pytorch_model.bin.index.json"}


class Shelf:
    """A source whose files come and go; a context manager.

    Attributes:
        source: what is there now.
        native: whether it is in our own format.
    """

    def __init__(
        self, path: Path, *, native: bool = False, arrive: Arrive | None = None, partial: bool = False
    ) -> None:
        """Open what is there.

        Args:
            path: the source's folder or file.
            native: it is a folder of our own format, whole.
            arrive: called with the path of a missing file when it is needed; the file is there afterwards.
            partial: files may have been deleted by an earlier run, or given back in part.
        """
        self._path = path
        self._arrive = arrive
        self._partial = partial or arrive is not None
        self._resumed = partial
        self.native = native
        self.source = open_native(path) if native else self._open()
        self._homes: Mapping[str, str] = {}
        if self.source.missing_files:
            self._homes = find_weight_files(path).index

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *_: object) -> None:
        self.source.close()

    @property
    def arriving(self) -> bool:
        """Whether missing files can be brought."""
        return self._arrive is not None

    def home_of(self, name: str) -> str:
        """The name of the file that holds a tensor, there or not."""
        tensor = self.source.tensors.get(name)
        if tensor is not None:
            return tensor.file.name
        if name not in self._homes:
            raise CheckpointError(f"{self._path} has no tensor {name}, and no index says where it will be.")
        return self._homes[name]

    def names(self) -> set[str]:
        """Every tensor, there or promised by the index."""
        return {*self.source.tensors, *self._homes}

    def fetch(self, names: Iterable[str]) -> bool:
        """Let the files arrive that hold these tensors; whether any was missing.

        Raises:
            CheckpointError: a file is missing and nobody brings it.
        """
        missing = sorted({self.home_of(name) for name in names if name not in self.source.tensors})
        for file in missing:
            if self._arrive is None:
                raise CheckpointError(
                    f"{self._path / file} is missing, and not all of it has been converted. Fetch it again."
                )
            self._arrive(self._path / file)
        if missing:
            self.source.close()
            self.source = self._open()
        return bool(missing)

    def fetch_again(self, file: Path) -> None:
        """Let a file arrive anew in the place of one that is of no use any more; only where files arrive."""
        assert self._arrive is not None, "files arrive"
        self.source.close()
        delete_file(file)
        self._arrive(file)
        self.source = self._open()

    def delete(self, file: str) -> int:
        """Delete a file of weights that is used up; its bytes."""
        path = next((known for known in self.source.files if known.name == file), None)
        if path is None:  # gone already; its mark may be there
            return delete_file((self._path if self._path.is_dir() else self._path.parent) / file)
        self.source.release(path)
        return delete_file(path)

    def _open(self) -> Source:
        """What is there of a foreign source; holes are accepted where an earlier run may have made them."""
        return open_source(self._path, partial=self._partial, holed=self._resumed)

    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """What the files of weights are known by: size and a hash of their first and last bytes."""
        return {file.name: _fingerprint(file) for file in self.source.files}


def check_deletable(path: Path, source: Source) -> None:
    """See that deleting the files of a source would give their room back.

    Raises:
        ConfigError: one is a symbolic link, as in the cache of huggingface_hub, or lies where nothing may be deleted.
    """
    folder = path if path.is_dir() else path.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--delete-source may not delete anything in {folder}: it is read-only for you. Convert without it, or "
            "change the folder's permissions."
        )
    links = [file.name for file in source.files if file.is_symlink()]
    if links:
        raise ConfigError(
            f"--delete-source would only delete links: {path / links[0]} is a symbolic link. Convert without it and delete the cache yourself."
        )


def delete_file(path: Path) -> int:
    """Delete a file, and the mark that it was given back in part; the bytes that it had, 0 if it was not there."""
    nbytes = 0
    try:
        with contextlib.suppress(FileNotFoundError):
            nbytes = path.stat().st_size
            path.unlink()
        mark = mark_of(path)
        mark.unlink(missing_ok=True)
        mark.with_name(f"{mark.name}.new").unlink(missing_ok=True)  # of a run that was killed while it wrote the mark
    except OSError as error:
        raise DiskError(
            f"{path} cannot be deleted: {error.strerror}. Delete it yourself; where the result is not whole yet, "
            "--resume without --delete-source goes on."
        ) from error
    return nbytes


def delete_index(path: Path, files: Iterable[str]) -> None:
    """Delete the index of a source that has lost all of its files; not that of another format beside it."""
    for ending in {Path(name).suffix for name in files} & INDEX_FILES.keys():
        delete_file(path / INDEX_FILES[ending])


def _fingerprint(path: Path) -> dict[str, Any]:
    with CheckedFile(path) as file:
        edge = min(_EDGE_BYTES, file.size)
        sha = hashlib.sha256(file.read(0, edge))
        sha.update(file.read(file.size - edge, edge))
        return {"nbytes": os.stat(path).st_size, "edges": sha.hexdigest()}  # noqa: PTH116
