"""A foreign checkpoint as one table of tensors, whatever files it came in.

`open_source` finds the weights of a folder (safetensors or torch's .bin; single, in shards with an
index or without), reads only their headers, and gives a `Source` whose tensors can be read whole or
piece by piece. Tensors come as the file stores them: no change of dtype, no change of names.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt.checked_file import CheckedFile, printable, read_json_object
from moss_jt.converters.holes import check_unmarked
from moss_jt.converters.strided import StoredTensor, flat_bytes, read_tensor, row_major_stride
from moss_jt.converters.torch_file import read_torch_file
from moss_jt.converters.torch_zip import ZIP_MAGIC
from moss_jt.converters.weight_files import WeightFiles, find_weight_files
from moss_jt.errors import CheckpointError, ConfigError, ShapeError
from moss_jt.layout import TileLayout
from moss_jt.safetensors_file import DTYPES, read_open_header


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a foreign checkpoint.

    Attributes:
        dtype: "float16", "bfloat16", "float32", "int32", "uint8", "bool", …
        file: the file of weights that holds it.
        nbytes: of its row-major data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    nbytes: int


class Source:
    """The tensors of a foreign checkpoint; a context manager. Made by `open_source`.

    Attributes:
        path: the folder, or the single file, that was opened.
        config: what config.json holds; {} where a single file has none beside it.
        files: the files of weights that are there.
        missing_files: those that should be there and are not; empty unless asked for with `partial`.
        tensors: by name, in the order in which they lie in the files.
        layouts: of quantised matrices of ours, whose blobs are the tensors; empty but for a native folder.
    """

    def __init__(self, path: Path, config: dict[str, Any], missing_files: list[Path]) -> None:
        self.path = path
        self.config = config
        self.files: list[Path] = []
        self.missing_files = missing_files
        self.tensors: dict[str, SourceTensor] = {}
        self.layouts: dict[str, TileLayout] = {}
        self._open: dict[Path, CheckedFile] = {}
        self._stored: dict[str, StoredTensor] = {}
        self._view_lock = threading.Lock()
        self._view: tuple[str, npt.NDArray[np.uint8]] | None = None  # the last view that was put in order

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; tensors cannot be read any more."""
        for file in self._open.values():
            file.close()
        self._view = None

    def release(self, file: Path) -> None:
        """Close one of `files`, so that deleting it frees its room on the disk; its tensors cannot be read any more."""
        self._open[file].close()
        self._view = None

    def read(self, name: str) -> npt.NDArray[Any]:
        """Read a tensor whole, in row-major order; bfloat16 comes as uint16, 8-bit floats as uint8.

        Raises:
            CheckpointError: there is no such tensor, or its file has become shorter.
            DiskError: the disk failed.
        """
        stored = self._find(name)
        return read_tensor(self._open[self.tensors[name].file], stored)

    def read_into(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        """Fill `out` with the row-major bytes of a tensor from byte `start` on; raises as `read` does.

        Reads straight into the array's memory; several threads may do so at once. A tensor that is stored as a view is put in order as a
        whole at the first piece and kept until another view is asked for.

        Raises:
            ShapeError: `out` is not contiguous, or the piece does not lie inside the tensor.
        """
        stored = self._find(name)
        if start < 0 or start + out.nbytes > stored.nbytes or not out.flags.c_contiguous:
            raise ShapeError(
                f"{name} has {stored.nbytes} bytes; a contiguous array for {out.nbytes} of them from byte {start} "
                f"was to be filled. Ask for a piece inside the tensor."
            )
        if stored.contiguous:
            self._open[self.tensors[name].file].read_into(stored.start + start, flat_bytes(out))
            return
        with self._view_lock:
            if self._view is None or self._view[0] != name:
                self._view = None  # its memory first
                self._view = (name, self.read(name).reshape(-1).view(np.uint8))
            flat_bytes(out)[:] = self._view[1][start : start + out.nbytes].data

    def read_bytes(self, name: str, start: int, nbytes: int) -> memoryview:
        """Part of a tensor's row-major bytes, in new memory; raises as `read_into` does."""
        out = np.empty(max(0, min(nbytes, self._find(name).nbytes + 1)), np.uint8)
        self.read_into(name, start, out)
        return out.data

    def expect(self, name: str) -> None:
        """Let the system read a tensor ahead, because it will be asked for soon."""
        stored = self._find(name)
        if stored.contiguous:
            self._open[self.tensors[name].file].expect(stored.start, stored.nbytes)

    def place(self, name: str) -> tuple[int, int] | None:
        """Where a tensor lies in its file, (start, bytes); None for one that is stored as a view."""
        stored = self._find(name)
        return (stored.start, stored.nbytes) if stored.contiguous else None

    def _find(self, name: str) -> StoredTensor:
        if name not in self._stored:
            raise CheckpointError(
                f"{printable(self.path)} holds no tensor {printable(name)}. Is the checkpoint complete?"
            )
        return self._stored[name]

    def add_file(self, file: CheckedFile, tensors: Mapping[str, StoredTensor]) -> None:
        """Take up an open file and what it holds; for whoever opens a source.

        Raises:
            CheckpointError: another file holds one of the tensors too.
        """
        self.files.append(file.path)
        self._open[file.path] = file
        for name, stored in sorted(tensors.items(), key=lambda item: item[1].start):
            if name in self._stored:
                other = self.tensors[name].file.name
                raise CheckpointError(
                    f"{printable(self.path)} holds {name} twice, in {printable(other)} and {printable(file.path.name)}. "
                    f"Leave only the files of one checkpoint."
                )
            self._stored[name] = stored
            self.tensors[name] = SourceTensor(name, stored.dtype, stored.shape, file.path, stored.nbytes)


def open_source(path: Path, *, partial: bool = False, holed: bool = False) -> Source:
    """Open a foreign checkpoint and list its tensors.

    Args:
        path: the folder of a model, or one file of weights.
        partial: pass over shards that are not there (`Source.missing_files` names them).
        holed: accept files that --delete-source has given back in part; whoever reads looks out for holes.

    Raises:
        ConfigError: config.json is missing from the folder or is not a JSON object.
        CheckpointError: weights are missing, damaged, given back in part, or not to be trusted.
        DiskError: the disk failed.
    """
    if os.path.isdir(path):  # noqa: PTH112 (Path.is_dir raises where the parent may not be read)
        config = read_json_object(path / "config.json", error=ConfigError)
        weights = find_weight_files(path)
    else:
        beside = path.parent / "config.json"
        config = read_json_object(beside, error=ConfigError) if os.path.lexists(beside) else {}
        weights = WeightFiles([path])
    if weights.missing and not partial:
        more = f" and {len(weights.missing) - 1} more" if len(weights.missing) > 1 else ""
        raise CheckpointError(
            f"{printable(path / weights.missing[0])}{more}: promised by {weights.said_by}, but missing. Fetch the rest."
        )
    source = Source(path, config, [path / name for name in weights.missing])
    with ExitStack() as on_failure:
        on_failure.callback(source.close)
        for name in weights.found:
            if not holed:
                check_unmarked(name)
            file = on_failure.enter_context(CheckedFile(name))
            source.add_file(file, _list_tensors(file))
        _check_index(source, weights)
        on_failure.pop_all()
    return source


def _list_tensors(file: CheckedFile) -> dict[str, StoredTensor]:
    """The tensors of one file, whose kind is told by its first bytes, not by its name."""
    head = file.head(9)
    by_bytes = head[6:] == b"\0\0{"  # a length below 2**48, then JSON
    if head.startswith(ZIP_MAGIC) or not (by_bytes or file.path.suffix == ".safetensors"):
        return read_torch_file(file)
    tensors, _ = read_open_header(file)
    return {
        name: StoredTensor(DTYPES[raw.dtype][0], raw.shape, row_major_stride(raw.shape), raw.start)
        for name, raw in tensors.items()
    }


def _check_index(source: Source, weights: WeightFiles) -> None:
    """Hold the index against what the files really hold."""
    there = {path.name for path in weights.found}
    for name, file in weights.index.items():
        if file not in there:
            continue
        if name not in source.tensors or source.tensors[name].file.name != file:
            raise CheckpointError(
                f"{printable(source.path / file)} lacks {printable(name, 120)}, which {weights.said_by} says it holds. "
                f"Fetch both again."
            )
