"""The header of a safetensors file, read strictly and without mapping the file; and whole small files, written.

A safetensors file is 8 bytes of header length, a JSON header, then the tensors without holes.
Nothing of the tensors is read here: what comes back says where each lies.

Source: the format's own description, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt.checked_file import MAX_JSON_BYTES, CheckedFile, parse_json_object, printable, wrong_kind
from moss_jt.errors import CheckpointError

# safetensors code -> (our name, bytes of an element)
DTYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
}
MAX_DIMENSIONS = 64  # torch's own limit
MAX_NAME = 512
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class RawTensor:
    """Where a tensor lies in its file.

    Attributes:
        dtype: safetensors code, such as "F16".
        start: offset from the beginning of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_open_header(file: CheckedFile) -> tuple[dict[str, RawTensor], dict[str, str]]:
    """Read the header of a safetensors file.

    Returns:
        The tensors in the order in which they lie in the file, and the metadata ({} if there is none).

    Raises:
        CheckpointError: anything is wrong with the file; its tensors then are not to be trusted.
    """
    where = printable(file.path)
    kind = wrong_kind(file.head(64))
    if kind:
        raise CheckpointError(f"{where} {kind}")
    length = int.from_bytes(file.read(0, _LENGTH_BYTES), "little")
    if length > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{where} claims a header of {length} bytes; at most {MAX_JSON_BYTES} are accepted. "
            f"It is damaged or not a safetensors file."
        )
    text = file.read(_LENGTH_BYTES, length)
    if text[:1] != b"{":
        raise CheckpointError(f"{where} is not a safetensors file: its header does not begin with {{. Fetch it again.")
    header = parse_json_object(text, f"the header of {where}")
    metadata = _read_metadata(header.pop("__metadata__", {}), where)
    data_start = _LENGTH_BYTES + length
    tensors = {name: _read_entry(name, entry, data_start, where) for name, entry in header.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)))
    _check_gapless(ordered, data_start, file.size, where)
    return ordered, metadata


def write_tensors(file: Path, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write a safetensors file of arrays, which are not copied.

    An ordinary write: an OSError says what failed, and the file's mode is the user's own. The safetensors package has an
    error of its own, without a number, and leaves the file to its owner alone.
    """
    codes = {name: code for code, (name, _) in DTYPES.items()}
    header: dict[str, Any] = {}
    end = 0
    for name, array in tensors.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": codes[array.dtype.name], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)  # tensors begin at a multiple of 8
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for array in tensors.values():
            opened.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def check_name(name: object, where: str) -> str:
    """A tensor's name, if it is one that can be printed and used.

    Raises:
        CheckpointError: it is not text, empty, too long, or holds control characters.
    """
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise CheckpointError(
            f'{where} has a tensor with the unusable name "{printable(name, 60)}". Do not use this file.'
        )
    return name


def _read_metadata(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{where}: __metadata__ must be an object of texts. Fetch it again.")
    return value


def _read_entry(name: str, entry: Any, data_start: int, where: str) -> RawTensor:
    check_name(name, where)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{where}: {name} must be described by dtype, shape and data_offsets and nothing else. Fetch it again."
        )
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(f"{where}: {name} has the unknown dtype {_brief(code)}. Fetch it again.")
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"{where}: {name} has the impossible shape {_brief(shape)}. Fetch it again.")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: {name} has the impossible data_offsets {_brief(offsets)}. Fetch it again.")
    nbytes = offsets[1] - offsets[0]
    wanted = prod(shape) * DTYPES[code][1]
    if nbytes != wanted:
        raise CheckpointError(
            f"{where}: {name} {tuple(shape)} {code} needs {wanted} bytes, its data_offsets give it {nbytes}. Fetch it again."
        )
    return RawTensor(code, tuple(shape), data_start + offsets[0], nbytes)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _brief(value: Any) -> str:
    """A parsed JSON value for a message; what is long or nested is only named by its kind."""
    if isinstance(value, list) and len(value) <= 8 and all(isinstance(item, int | float | str) for item in value):
        return printable(value, 80)
    return f"(a {type(value).__name__})" if isinstance(value, list | dict) else printable(value, 80)


def _check_gapless(tensors: dict[str, RawTensor], data_start: int, size: int, where: str) -> None:
    """Hold the format's law: the tensors fill the file from the header to its end, each byte once."""
    position, previous = data_start, "the header"
    for name, tensor in tensors.items():
        if tensor.start != position:
            fault = "overlap" if tensor.start < position else "leave a hole"
            raise CheckpointError(
                f"{where} is damaged: {previous} and {name} {fault} at byte {position}. Fetch it again."
            )
        position, previous = tensor.start + tensor.nbytes, name
    if position > size:
        raise CheckpointError(f"{where} is cut short: it should have {position} bytes and has {size}. Fetch it again.")
    if position < size:
        raise CheckpointError(f"{where} has {size - position} bytes too many after its last tensor. Fetch it again.")
