"""A native folder as the source of a conversion: the same face as a foreign checkpoint."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from moss_jt.checked_file import CheckedFile, read_json_object
from moss_jt.checkpoint import CONFIG_FILE, Checkpoint, Entry
from moss_jt.converters.source import Source
from moss_jt.converters.strided import StoredTensor, row_major_stride
from moss_jt.errors import ConfigError
from moss_jt.layout import TileLayout


def open_native(path: Path) -> Source:
    """Open a native folder; a quantised matrix is a tensor of bytes whose layout is told.

    Raises:
        ConfigError, CheckpointError, DiskError: as `Checkpoint.open` does.
    """
    checkpoint = Checkpoint.open(path)
    source = Source(path, read_json_object(path / CONFIG_FILE, error=ConfigError), [])
    files: dict[Path, dict[str, StoredTensor]] = {}
    for entry in checkpoint.entries.values():
        files.setdefault(entry.file, {})[entry.name] = _stored(entry)
        if isinstance(entry.layout, TileLayout):
            source.layouts[entry.name] = entry.layout
    with ExitStack() as on_failure:
        on_failure.callback(source.close)
        for file in sorted(files):
            source.add_file(on_failure.enter_context(CheckedFile(file)), files[file])
        on_failure.pop_all()
    return source


def _stored(entry: Entry) -> StoredTensor:
    """Where the numbers of a tensor lie, or the bytes of a blob."""
    if isinstance(entry.layout, TileLayout):
        return StoredTensor("uint8", (entry.nbytes,), (1,), entry.offset)
    shape = entry.layout.shape
    return StoredTensor(entry.layout.dtype, shape, row_major_stride(shape), entry.offset)
