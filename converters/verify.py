"""Read a whole native folder again: every checksum, every header, no number that is not finite."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss_jt.checked_file import CheckedFile, read_json_object
from moss_jt.checkpoint import MANIFEST_FILE, Checkpoint, Entry
from moss_jt.config import FORMAT_NAME, FORMAT_VERSION
from moss_jt.converters.floats import FLOAT_BYTES, bits_of, check_finite
from moss_jt.converters.journal import MAX_SMALL_BYTES
from moss_jt.converters.output import PIECE_BYTES
from moss_jt.errors import CheckpointError
from moss_jt.layout import TileLayout
from moss_jt.packing import read_perm
from moss_jt.progress import Progress, Quiet


@dataclass(frozen=True)
class Verification:
    """What was found to be right."""

    tensors: int
    nbytes: int
    files: int


def verify(path: Path, *, progress: Progress | None = None) -> Verification:
    """Compare a native folder with its manifest, down to the last byte.

    Raises:
        CheckpointError: the first thing that is wrong; its file and tensor are named.
        ConfigError: config.json is broken.
        DiskError: the disk fails.
    """
    checkpoint = Checkpoint.open(path)
    manifest = read_manifest(path)
    tensors = manifest["tensors"]
    if set(tensors) != set(checkpoint.entries):
        differing = ", ".join(sorted(set(tensors) ^ set(checkpoint.entries)))
        raise CheckpointError(
            f"{path / MANIFEST_FILE} and the weight files disagree about: {differing}. Convert it again."
        )
    report = progress or Quiet()
    report.begin("Verifying", sum(entry.nbytes for entry in checkpoint.entries.values()), "B")
    try:
        _check_headers(checkpoint, manifest["headers"])
        for name, digest in manifest["others"].items():
            _check_small_file(path, name, digest)
        for entry in checkpoint.entries.values():
            _check_tensor(checkpoint, entry, tensors[entry.name], report)
    finally:
        report.end()
    total = sum(entry.nbytes for entry in checkpoint.entries.values())
    return Verification(len(tensors), total, len(manifest["headers"]) + len(manifest["others"]))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a native folder, its form checked.

    Raises:
        CheckpointError: it is missing, broken or newer than this program.
    """
    file = path / MANIFEST_FILE
    values = read_json_object(file)
    version = values.get("version")
    if values.get("format") != FORMAT_NAME or not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{file} is not a manifest of moss-jt. Convert the checkpoint again.")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has version {version}; this program reads up to {FORMAT_VERSION}. Update moss-jt."
        )
    if not all(isinstance(values.get(key), dict) for key in ("tensors", "headers", "others")):
        raise CheckpointError(f"{file} lacks its checksums. Convert the checkpoint again.")
    for name, told in values["tensors"].items():
        if not isinstance(told, dict) or not isinstance(told.get("sha256"), str):
            raise CheckpointError(f"{file} has no checksum for {name}. Convert the checkpoint again.")
    return values


def _check_headers(checkpoint: Checkpoint, headers: dict[str, Any]) -> None:
    """Compare the header of each file of weights: everything before its first tensor."""
    starts: dict[Path, int] = {}
    for entry in checkpoint.entries.values():
        starts[entry.file] = min(entry.offset, starts.get(entry.file, entry.offset))
    if {file.name for file in starts} != set(headers):
        raise CheckpointError(f"{checkpoint.path / MANIFEST_FILE} does not name the weight files that are there.")
    for file, start in starts.items():
        with CheckedFile(file) as opened:
            found = hashlib.sha256(opened.read(0, start)).hexdigest()
        if found != headers[file.name]:
            raise CheckpointError(f"{file}: the header has changed since it was written. Convert the checkpoint again.")


def _check_small_file(path: Path, name: str, digest: object) -> None:
    if Path(name).name != name:
        raise CheckpointError(f"{path / MANIFEST_FILE} names {name!r}, which is not a file of its folder.")
    with CheckedFile(path / name) as file:
        if file.size > MAX_SMALL_BYTES or hashlib.sha256(file.read(0, file.size)).hexdigest() != digest:
            raise CheckpointError(f"{path / name} has changed since it was written. Convert the checkpoint again.")


def _check_tensor(checkpoint: Checkpoint, entry: Entry, told: dict[str, Any], progress: Progress) -> None:
    """Compare one tensor's bytes with its checksum, and see that its numbers are finite."""
    sha = hashlib.sha256()
    layout = entry.layout
    step = PIECE_BYTES
    if isinstance(layout, TileLayout):
        step = max(1, PIECE_BYTES // layout.tile_bytes) * layout.tile_bytes
    for start in range(0, entry.nbytes, step):
        piece = checkpoint.read(entry.name, start=start, nbytes=min(step, entry.nbytes - start))
        sha.update(piece.data)
        _check_numbers(entry, piece, start)
        progress.advance(len(piece))
    if sha.hexdigest() != told["sha256"]:
        raise CheckpointError(
            f"{entry.file}: {entry.name} is not what was written (SHA-256 {sha.hexdigest()[:12]}…, "
            f"the manifest says {told['sha256'][:12]}…). Convert or fetch it again."
        )
    if isinstance(layout, TileLayout) and layout.permuted:
        _check_permutation(checkpoint, entry, layout)


def _check_permutation(checkpoint: Checkpoint, entry: Entry, layout: TileLayout) -> None:
    try:
        read_perm(checkpoint.read(entry.name), layout)
    except CheckpointError as error:
        raise CheckpointError(f"{entry.file}: {entry.name}: {error}") from error


def _check_numbers(entry: Entry, piece: np.ndarray[Any, np.dtype[np.uint8]], start: int) -> None:
    """See that the floats (or the scales) in a piece of a tensor are finite."""
    where, layout = f"{entry.file}: {entry.name}", entry.layout
    if not isinstance(layout, TileLayout):
        size = FLOAT_BYTES[layout.dtype]
        count = int(np.prod(layout.shape)) - start // size  # what follows is padding
        if count > 0:
            check_finite(bits_of(piece, layout.dtype)[:count], layout.dtype, where, layout.shape, start // size)
        return
    tiles = min(len(piece), layout.perm_offset - start) // layout.tile_bytes
    if tiles > 0:
        body = piece[: tiles * layout.tile_bytes].reshape(tiles, layout.tile_bytes)
        scales = np.ascontiguousarray(body[:, layout.code_bytes : layout.code_bytes + layout.scale_bytes])
        shape = (layout.n_tiles, layout.scale_bytes // 2)
        first = start // layout.tile_bytes * shape[1]
        check_finite(bits_of(scales, "float16"), "float16", f"{where} scale of tile", shape, first)
