"""A native folder back to a Hugging Face one: the same tensors that a conversion was made from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt.checked_file import read_json_object
from moss_jt.checkpoint import CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, Checkpoint, Entry, is_quantized_name
from moss_jt.config import FloatType
from moss_jt.converters.floats import bits_of, cast_bits, check_fits
from moss_jt.converters.journal import Workplace, copy_small_files
from moss_jt.converters.names import GPTQ_PARTS, gptq_names
from moss_jt.converters.output import PIECE_BYTES, Pieces, TensorWriter, check_finished, check_room, finish, verify_done
from moss_jt.converters.plan import CODES, Plan, PlannedTensor, dump_json, foreign_files
from moss_jt.errors import CheckpointError, ConfigError
from moss_jt.layout import ITEM_BYTES, TILE_ROWS, TileLayout
from moss_jt.packing import GptqMatrix, dequantize, parse_perm, unpack_gptq, unpack_tiles
from moss_jt.progress import Progress, Quiet
from moss_jt.tokenizer import TOKENIZER_FILES

KIND = "jittor2hf"


@dataclass(frozen=True)
class BackConversion:
    """What a conversion back did.

    Attributes:
        path: the Hugging Face folder.
        nbytes: of its weight files.
        tensors: how many there are.
        resumed: how many of them an earlier run had finished.
        head: the type that a quantised head was turned into, None where the head was not quantised.
            Hugging Face's form has no other place for it; its int4 or int8 codes are lost.
    """

    path: Path
    nbytes: int
    tensors: int
    resumed: int = 0
    head: FloatType | None = None


def jittor2hf(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> BackConversion:
    """Convert a native folder to a Hugging Face one, with safetensors files.

    A quantised head becomes floating point again, of the type of the other weights.

    Raises:
        ConfigError: the destination is taken (with `resume`: by something else), or the source changed since
            an interrupted run.
        CheckpointError: the native folder is broken.
        DiskError: not enough room, or the disk fails; the conversion can be resumed.
    """
    checkpoint = Checkpoint.open(src)
    target = Path(os.path.abspath(dst))  # noqa: PTH100 (keeps links)
    head = _float_type(checkpoint) if checkpoint.config.head_quantization else None
    report = progress or Quiet()
    with Workplace(target, KIND, resume=resume) as workplace:
        plan = _plan(checkpoint)
        if workplace.whole:
            check_finished(workplace, plan)
            return BackConversion(target, plan.nbytes, len(plan.places()), len(plan.places()), head)
        done: dict[str, str] = {}
        if workplace.plan is None:
            check_room(workplace, plan.nbytes)
            copy_small_files(checkpoint.path, TOKENIZER_FILES, workplace.out)
            workplace.start(plan)
        elif workplace.plan.digest() != plan.digest():
            raise ConfigError(
                f"{checkpoint.path} changed since the conversion began. Delete {workplace.path} and start again."
            )
        else:
            done = verify_done(workplace, report)
            check_room(workplace, plan.nbytes)
        resumed = len(done)
        _write(workplace, checkpoint, plan, done, report)
        finish(workplace, done, manifest=False)
    return BackConversion(target, plan.nbytes, len(plan.places()), resumed, head)


def foreign_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config.json that the tensors need, in the original's words."""
    values = read_json_object(checkpoint.path / CONFIG_FILE)
    values.pop("moss_jt", None)
    quantization = checkpoint.config.quantization
    if quantization is not None:
        values["wbits"], values["groupsize"] = quantization.bits, quantization.group_size
    return values


def foreign_tensors(checkpoint: Checkpoint) -> Iterator[PlannedTensor]:
    """The tensors that a Hugging Face folder of this model has, in its order."""
    for name, entry in checkpoint.entries.items():
        layout = entry.layout
        if not isinstance(layout, TileLayout):
            yield PlannedTensor(name, CODES[layout.dtype], layout.shape)
            continue
        if not is_quantized_name(name):
            yield PlannedTensor(name, CODES[_float_type(checkpoint)], layout.shape)
            continue
        n, k = layout.shape
        if n % layout.block or k % layout.block:
            raise CheckpointError(
                f"{name} is {n} x {k}; the words of GPTQ hold {layout.block} codes each, so it cannot be written as such."
            )
        names = gptq_names(name)
        yield PlannedTensor(names["qweight"], "I32", (k // layout.block, n))
        yield PlannedTensor(names["qzeros"], "I32", (layout.n_groups, n // layout.block))
        yield PlannedTensor(names["scales"], "F16", (layout.n_groups, n))
        yield PlannedTensor(names["g_idx"], "I32", (k,))


def _float_type(checkpoint: Checkpoint) -> FloatType:
    """What a quantised head becomes."""
    return checkpoint.config.dtype or "float16"


def _plan(checkpoint: Checkpoint) -> Plan:
    files = foreign_files(foreign_tensors(checkpoint))
    weights = sorted({entry.file for entry in checkpoint.entries.values()})
    inputs = {"files": {file.name: file.stat().st_size for file in weights}, "manifest": _manifest_digest(checkpoint)}
    texts = {CONFIG_FILE: dump_json(foreign_config(checkpoint))}
    return Plan(KIND, inputs, files, INDEX_FILE if len(files) > 1 else None, texts)


def _manifest_digest(checkpoint: Checkpoint) -> str | None:
    file = checkpoint.path / MANIFEST_FILE
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _write(workplace: Workplace, checkpoint: Checkpoint, plan: Plan, done: dict[str, str], progress: Progress) -> None:
    """Make and write every tensor that is not done."""
    places = plan.places()
    progress.begin(
        f"Converting to {workplace.dst.name}", sum(t.nbytes for n, (_, t) in places.items() if n not in done), "B"
    )
    try:
        with TensorWriter(workplace, plan, done, progress) as writer:
            for name, entry in checkpoint.entries.items():
                if not isinstance(entry.layout, TileLayout) or not is_quantized_name(name):
                    if name not in done:
                        writer.put(name, _float_pieces(checkpoint, entry))
                    continue
                parts = {part: full for part, full in gptq_names(name).items() if full not in done}
                if parts:
                    words = _read_words(checkpoint, entry, entry.layout)
                    for part in (part for part in GPTQ_PARTS if part in parts):
                        writer.put(parts[part], iter([getattr(words, part)]))
    finally:
        progress.end()


def _float_pieces(checkpoint: Checkpoint, entry: Entry) -> Pieces:
    """The bytes of a tensor without the padding of its blob; a quantised one turned into floats."""
    if isinstance(entry.layout, TileLayout):
        yield from _dequantized_pieces(checkpoint, entry, entry.layout)
        return
    nbytes = int(np.prod(entry.layout.shape)) * ITEM_BYTES[entry.layout.dtype]
    for start in range(0, nbytes, PIECE_BYTES):
        yield checkpoint.read(entry.name, start=start, nbytes=min(PIECE_BYTES, nbytes - start))


def _read_words(checkpoint: Checkpoint, entry: Entry, layout: TileLayout) -> GptqMatrix:
    try:
        return unpack_gptq(checkpoint.read(entry.name), layout)
    except CheckpointError as error:
        raise CheckpointError(f"{entry.file}: {entry.name}: {error}") from error


def _dequantized_pieces(checkpoint: Checkpoint, entry: Entry, layout: TileLayout) -> Pieces:
    """The numbers of a quantised matrix, some tiles at a time."""
    n, k = layout.shape
    perm = _read_order(checkpoint, entry, layout)
    dtype = _float_type(checkpoint)
    step = max(1, PIECE_BYTES // (TILE_ROWS * k * 4))
    for first in range(0, layout.n_tiles, step):
        count = min(step, layout.n_tiles - first)
        tiles = checkpoint.read(entry.name, start=first * layout.tile_bytes, nbytes=count * layout.tile_bytes)
        numbers = dequantize(unpack_tiles(tiles, layout, perm))[: n - first * TILE_ROWS]
        bits = cast_bits(bits_of(numbers, "float32"), "float32", dtype)
        check_fits(bits, dtype, f"{entry.file}: {entry.name}", layout.shape, first * TILE_ROWS * k)
        yield bits


def _read_order(checkpoint: Checkpoint, entry: Entry, layout: TileLayout) -> npt.NDArray[np.int32]:
    """Which input lies at each position of a matrix."""
    end = checkpoint.read(entry.name, start=layout.perm_offset)
    try:
        return parse_perm(end, layout)
    except CheckpointError as error:
        raise CheckpointError(f"{entry.file}: {entry.name}: {error}") from error
