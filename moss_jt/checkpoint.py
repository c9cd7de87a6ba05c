"""A native checkpoint on disk: which tensors it has, where their bytes lie, and how to read them.

A native folder holds config.json, model-0000x-of-0000N.safetensors with their index, the files of
the tokenizer and manifest.json. Every matrix is a U8 tensor of whole 4096-byte pages whose layout
(`moss_jt.layout`) is told in the file's metadata; norms and biases are ordinary tensors. Opening
reads headers only and compares every name and shape with the config, so that later reads can
trust them. Bytes are read with pread and never mapped: what is read is counted where it is used.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt.checked_file import CheckedFile, Stamp, printable, read_json_object
from moss_jt.config import FORMAT_NAME, FORMAT_VERSION, FloatType, MossConfig, Quantization
from moss_jt.errors import CheckpointError, MossError, ShapeError
from moss_jt.layout import ALIGNMENT, Layout, PlainLayout, RowsLayout, TileLayout, layout_from_dict
from moss_jt.packing import inputs_per_group
from moss_jt.safetensors_file import RawTensor, read_open_header

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
MANIFEST_FILE = "manifest.json"
SINGLE_FILE = "model.safetensors"
HEAD = "lm_head.weight"
LAYOUTS_KEY = "moss_jt.tensors"  # in the metadata of each file

_FLOAT_TYPES: dict[str, FloatType] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_QUANTIZED_SUFFIXES = (".attn.qkv_proj.weight", ".attn.out_proj.weight", ".mlp.fc_in.weight", ".mlp.fc_out.weight")
_BLOCK_TENSORS = 8  # tensors of one layer


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies.

    Attributes:
        offset: of its first byte, from the start of the file.
        nbytes: padding of the blob included.
    """

    name: str
    file: Path
    offset: int
    nbytes: int
    layout: Layout


def block_shapes(config: MossConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of one layer by the end of their names, in the order of the original."""
    width, inner = config.n_embd, config.inner_dim
    return {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.qkv_proj.weight": (3 * width, width),
        "attn.out_proj.weight": (width, width),
        "mlp.fc_in.weight": (inner, width),
        "mlp.fc_in.bias": (inner,),
        "mlp.fc_out.weight": (width, inner),
        "mlp.fc_out.bias": (width,),
    }


def expected_shapes(config: MossConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor name of a MOSS model and its logical shape, in the order in which a token meets them."""
    width, vocab = config.n_embd, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (vocab, width)}
    of_block = block_shapes(config)
    for layer in range(config.n_layer):
        shapes.update({f"transformer.h.{layer}.{name}": shape for name, shape in of_block.items()})
    shapes["transformer.ln_f.weight"] = (width,)
    shapes["transformer.ln_f.bias"] = (width,)
    shapes[HEAD] = (vocab, width)
    shapes["lm_head.bias"] = (vocab,)
    return shapes


def is_quantized_name(name: str) -> bool:
    """Whether a tensor is one of a block's matrices, those that a quantised model keeps in int4 or int8."""
    return name.startswith("transformer.h.") and name.endswith(_QUANTIZED_SUFFIXES)


def quantization_of(config: MossConfig, name: str) -> Quantization | None:
    """How a tensor of a model is quantised, None for floating point."""
    if name == HEAD:
        return config.head_quantization
    return config.quantization if is_quantized_name(name) else None


def check_layer_count(config: MossConfig, found: int) -> None:
    """Refuse a config with far more layers than there are tensors, before their names are listed.

    Raises:
        CheckpointError: a config.json of another model, or one made to exhaust the memory.
    """
    if config.n_layer > 2 * found + 100:
        raise CheckpointError(
            f"the config asks for {config.n_layer} layers of {_BLOCK_TENSORS} tensors; the files hold {found} tensors. "
            "Is config.json from another checkpoint?"
        )


def is_native(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds our format (a config.json with our key), whole or not."""
    try:
        return isinstance(read_json_object(Path(path) / CONFIG_FILE).get("moss_jt"), dict)
    except MossError:
        return False


class Checkpoint:
    """A native folder, opened: names, places and layouts are known and agree with the config.

    Attributes:
        path: the folder.
        config: what config.json says.
        entries: every tensor by name, in the order of `expected_shapes`.
        stamps: of the weight files, as they were when their headers were read.
    """

    def __init__(
        self, path: Path, config: MossConfig, entries: dict[str, Entry], stamps: dict[Path, Stamp] | None = None
    ) -> None:
        self.path = path
        self.config = config
        self.entries = entries
        self.stamps = stamps or {}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Read the headers of a native folder and compare them with its config.

        Raises:
            ConfigError: config.json is missing, broken, or of a newer version.
            CheckpointError: a file is missing or broken, or tensors are missing, unexpected or
                of the wrong shape or layout; all of them are named.
        """
        folder = Path(path)
        config = MossConfig.from_file(folder / CONFIG_FILE)
        if not is_native(folder):
            raise CheckpointError(
                f"{folder} is not in the native format. Convert it with: moss-convert hf2jittor {folder}"
            )
        found: dict[str, Entry] = {}
        stamps: dict[Path, Stamp] = {}
        for path_of_file, names in _files_of(folder).items():
            with CheckedFile(path_of_file) as file:
                stamps[file.path] = file.stamp
                for entry in _entries_of(file, names):
                    found[entry.name] = entry
        return cls(folder, config, _compare(folder, config, found), stamps)

    def read(
        self, name: str, *, start: int = 0, nbytes: int | None = None, out: npt.NDArray[np.uint8] | None = None
    ) -> npt.NDArray[np.uint8]:
        """Read bytes of a tensor, from `start` within it.

        Args:
            name: one of `entries`.
            start: first byte, counted from the tensor's own.
            nbytes: how many; None for all that follow.
            out: contiguous uint8 array of exactly that many bytes to fill; None makes one.

        Returns:
            `out`, or a new array.

        Raises:
            CheckpointError: the file ends too early, or has no such tensor.
            DiskError: the disk fails.
            ShapeError: the range is not inside the tensor, or `out` does not fit it.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path} has no tensor {name}.")
        count = entry.nbytes - start if nbytes is None else nbytes
        if start < 0 or count < 0 or start + count > entry.nbytes:
            raise ShapeError(f"bytes {start} to {start + count} are not inside {name}, which has {entry.nbytes}.")
        if out is None:
            out = np.empty(count, dtype=np.uint8)
        elif out.dtype != np.uint8 or out.nbytes != count or not out.flags.c_contiguous:
            raise ShapeError(f"out is {out.dtype} of {out.nbytes} bytes; {count} contiguous uint8 are to be read.")
        read_into(entry.file, entry.offset + start, out)
        return out

    def read_plain(self, name: str) -> npt.NDArray[np.float32]:
        """Read a small tensor (norm, bias) as float32 in its shape.

        Raises:
            CheckpointError, DiskError: as in `read`.
            ShapeError: the tensor is a matrix.
        """
        raw = self.read(name)
        layout = self.entries[name].layout
        if not isinstance(layout, PlainLayout):
            raise ShapeError(f"{name} is a matrix; read_plain reads norms and biases.")
        return floats_from_bytes(raw, layout.dtype).reshape(layout.shape)


def floats_from_bytes(raw: npt.NDArray[np.uint8], dtype: FloatType) -> npt.NDArray[np.float32]:
    """Stored little-endian floats as float32."""
    if dtype == "bfloat16":
        return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.view("<f2" if dtype == "float16" else "<f4").astype(np.float32)


def read_into(file: Path, offset: int, out: npt.NDArray[Any]) -> None:
    """Fill a contiguous array with the bytes of a file from `offset` on.

    Raises:
        CheckpointError: the file ends too early.
        DiskError: the file cannot be opened or the disk fails.
    """
    with CheckedFile(file) as opened:
        opened.read_into(offset, out.data.cast("B"))


def _files_of(folder: Path) -> dict[Path, set[str] | None]:
    """The weight files and the names that the index puts in each (None where there is no index)."""
    if not (folder / INDEX_FILE).exists():
        if not (folder / SINGLE_FILE).exists():
            raise CheckpointError(f"{folder} has neither {INDEX_FILE} nor {SINGLE_FILE}: no weights. Convert it again.")
        return {folder / SINGLE_FILE: None}
    weight_map = read_json_object(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map. Convert it again.")
    files: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or "\0" in file:
            where = f"{folder / INDEX_FILE} puts {printable(name)} in {printable(file)!r}"
            raise CheckpointError(f"{where}, which is not the name of a file of its folder.")
        names = files.setdefault(folder / file, set())
        assert names is not None, "a file with an index has a set of names"
        names.add(name)
    missing = sorted(file.name for file in files if not file.is_file())
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which its index names. Convert or fetch it again.")
    return files


def _entries_of(opened: CheckedFile, indexed: set[str] | None) -> list[Entry]:
    """The tensors of one file; names and metadata must agree with each other and the index."""
    file = opened.path
    tensors, metadata = read_open_header(opened)
    _check_format(file, metadata)
    try:
        layouts = json.loads(metadata.get(LAYOUTS_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the metadata {LAYOUTS_KEY} is not JSON: {error}.") from error
    if not isinstance(layouts, dict):
        raise CheckpointError(f"{file}: the metadata {LAYOUTS_KEY} is not an object.")
    if indexed is not None and indexed != set(tensors):
        differing = ", ".join(printable(name) for name in sorted(indexed ^ set(tensors)))
        raise CheckpointError(f"{file} and {INDEX_FILE} disagree about: {differing}. Convert it again.")
    without = sorted(set(layouts) - set(tensors))
    if without:
        raise CheckpointError(f"{file} describes tensors that it does not hold: {printable(', '.join(without))}.")
    return [_entry(file, name, raw, layouts.get(name)) for name, raw in tensors.items()]


def _check_format(file: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT_NAME:
        raise CheckpointError(
            f"{file} has format {metadata.get('format')!r} in its metadata where {FORMAT_NAME!r} was expected."
        )
    version = metadata.get("version", "")
    if not version.isascii() or not version.isdigit() or int(version) < 1:
        raise CheckpointError(f"{file} has version {version!r} in its metadata, which is not a number from 1 on.")
    if int(version) > FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has version {version} of the native format; this program reads up to {FORMAT_VERSION}. Update moss-jt."
        )


def _entry(file: Path, name: str, raw: RawTensor, described: Any) -> Entry:
    """One tensor's place, its description checked against its size and type."""
    layout: Layout
    if described is None:
        if raw.dtype not in _FLOAT_TYPES:
            raise CheckpointError(f"{file}: {name} is {raw.dtype}, neither a float tensor nor a described matrix.")
        layout = PlainLayout(tuple(raw.shape), _FLOAT_TYPES[raw.dtype])
    else:
        if not isinstance(described, dict):
            raise CheckpointError(f"{file}: the description of {name} is not an object.")
        try:
            layout = layout_from_dict(described)
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {name}: {error}") from error
        if raw.dtype != "U8" or tuple(raw.shape) != (layout.nbytes,):
            raise CheckpointError(
                f"{file}: {name} is {raw.dtype} {list(raw.shape)}; its layout needs U8 [{layout.nbytes}]."
            )
        if raw.start % ALIGNMENT:
            raise CheckpointError(f"{file}: {name} starts at byte {raw.start}, not at a multiple of {ALIGNMENT}.")
    return Entry(name, file, raw.start, raw.nbytes, layout)


def _compare(folder: Path, config: MossConfig, found: dict[str, Entry]) -> dict[str, Entry]:
    """See that tensors are exactly those of the config; all that is wrong goes into one error."""
    check_layer_count(config, len(found))
    shapes = expected_shapes(config)
    problems = [f"{name} is missing" for name in shapes if name not in found]
    problems += [f"{name} is not expected" for name in found if name not in shapes]
    for name, shape in shapes.items():
        if name in found:
            problems += _problems_of(found[name], shape, config)
    if problems:
        raise CheckpointError(
            f"{folder} does not fit its config.json: {'; '.join(problems)}. Is config.json from another checkpoint?"
        )
    return {name: found[name] for name in shapes}


def _problems_of(entry: Entry, shape: tuple[int, ...], config: MossConfig) -> list[str]:
    """What is wrong with one tensor, in words."""
    layout = entry.layout
    if layout.shape != shape:
        return [f"{entry.name} is {layout.shape}, the config asks for {shape}"]
    quantization = quantization_of(config, entry.name)
    if quantization is None:
        wanted: type = RowsLayout if len(shape) == 2 else PlainLayout
        return [] if isinstance(layout, wanted) else [f"{entry.name} is {_kind(layout)}, the config asks for floats"]
    group_size = inputs_per_group(quantization.group_size, shape[1])
    if isinstance(layout, TileLayout) and layout.bits == quantization.bits and layout.group_size == group_size:
        return []
    asked = f"int{quantization.bits} in groups of {group_size}"
    return [f"{entry.name} is {_kind(layout)}, the config asks for {asked}"]


def _kind(layout: Layout) -> str:
    """A layout in a few words."""
    if isinstance(layout, TileLayout):
        return f"int{layout.bits} in groups of {layout.group_size}"
    return f"{layout.dtype} {'rows' if isinstance(layout, RowsLayout) else 'numbers'}"
