"""Write tensors as torch.save does, streaming: a zip without compression, described by a small pickle.

Only what a state dict of plain tensors needs. The pickle is put together by hand, opcode by opcode,
so that torch is not needed and large tensors are never in memory.

Source: torch/serialization.py of torch 2.13, `_save`.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt.converters.plan import CODE_BYTES, PlannedTensor

_STORAGES = {"F16": "HalfStorage", "BF16": "BFloat16Storage", "F32": "FloatStorage", "I32": "IntStorage"}
_FOLDER = "archive"
_FIXED_TIME = (1980, 1, 1, 0, 0, 0)

Maker = Callable[[str], Iterable[npt.NDArray[Any]]]


def write_torch_file(path: Path, tensors: list[PlannedTensor], make: Maker) -> None:
    """Write a state dict.

    Args:
        path: file to make.
        tensors: in the order of the state dict.
        make: gives the numbers of a tensor by its name, in pieces, row-major and little-endian.

    Raises:
        OSError: the disk is full or fails.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _add(archive, "data.pkl", [np.frombuffer(_pickle(tensors), dtype=np.uint8)])
        _add(archive, "byteorder", [np.frombuffer(b"little", dtype=np.uint8)])
        for key, tensor in enumerate(tensors):
            _add(archive, f"data/{key}", make(tensor.name))
        _add(archive, "version", [np.frombuffer(b"3\n", dtype=np.uint8)])


def _add(archive: zipfile.ZipFile, name: str, pieces: Iterable[npt.NDArray[Any]]) -> None:
    info = zipfile.ZipInfo(f"{_FOLDER}/{name}", _FIXED_TIME)
    with archive.open(info, "w", force_zip64=True) as record:
        for piece in pieces:
            record.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)


def _pickle(tensors: list[PlannedTensor]) -> bytes:
    """An OrderedDict of tensors, as protocol 2."""
    empty_dict = b"ccollections\nOrderedDict\n)R"
    parts = [b"\x80\x02", empty_dict, b"("]
    for key, tensor in enumerate(tensors):
        count = tensor.nbytes // CODE_BYTES[tensor.code]
        strides = [int(np.prod(tensor.shape[axis + 1 :])) for axis in range(len(tensor.shape))]
        storage = (
            _text("storage")
            + f"ctorch\n{_STORAGES[tensor.code]}\n".encode()
            + _text(str(key))
            + _text("cpu")
            + _int(count)
        )
        parts += [
            _text(tensor.name),
            b"ctorch._utils\n_rebuild_tensor_v2\n((",
            storage + b"tQ",
            _int(0) + _tuple(tensor.shape) + _tuple(strides) + b"\x89" + empty_dict + b"tR",
        ]
    return b"".join([*parts, b"u."])


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _int(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little")
    return b"\x8a" + bytes([len(raw)]) + raw


def _tuple(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(_int(value) for value in values) + b"t"
