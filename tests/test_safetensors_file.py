"""The safetensors header: what the format's own library writes is read alike, and the format's laws are kept."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from moss_jt.checked_file import CheckedFile
from moss_jt.errors import CheckpointError
from moss_jt.safetensors_file import RawTensor, read_open_header


def write(path: Path, header: dict[str, Any] | bytes, data: bytes) -> Path:
    """A file with this header and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def read_header(path: Path) -> tuple[dict[str, RawTensor], dict[str, str]]:
    with CheckedFile(path) as file:
        return read_open_header(file)


def test_agrees_with_the_library_that_writes_the_format(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    arrays: dict[str, npt.NDArray[Any]] = {
        "half": rng.standard_normal((5, 3)).astype(np.float16),
        "word": rng.integers(-9, 9, (2, 2, 2)).astype(np.int32),
        "mask": np.array([[True, False]]),
        "scalar": np.array(2.5, np.float64),
        "empty": np.zeros((0, 7), np.float32),
        "byte": rng.integers(0, 255, 11).astype(np.uint8),
    }
    path = tmp_path / "a.safetensors"
    save_file(arrays, path, metadata={"format": "np"})
    tensors, metadata = read_header(path)
    assert metadata == {"format": "np"}
    assert tensors.keys() == arrays.keys()
    whole = path.read_bytes()
    for name, array in arrays.items():
        raw = tensors[name]
        assert (raw.shape, raw.nbytes) == (array.shape, array.nbytes)
        assert whole[raw.start : raw.start + raw.nbytes] == array.tobytes()
    assert {name: raw.dtype for name, raw in tensors.items()} == {
        "half": "F16",
        "word": "I32",
        "mask": "BOOL",
        "scalar": "F64",
        "empty": "F32",
        "byte": "U8",
    }


def test_tensors_come_in_the_order_of_the_file_not_of_the_header(tmp_path: Path) -> None:
    header = {
        "second": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]},
        "first": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
    }
    path = write(tmp_path / "a", header, b"abcde")
    start = path.stat().st_size - 5
    assert list(read_header(path)[0].items()) == [
        ("first", RawTensor("U8", (3,), start, 3)),
        ("second", RawTensor("U8", (2,), start + 3, 2)),
    ]


def test_header_may_be_padded_with_spaces_and_hold_no_tensor(tmp_path: Path) -> None:
    assert read_header(write(tmp_path / "a", b"{}" + b" " * 4086, b"")) == ({}, {})


def test_every_cut_is_noticed(tmp_path: Path, golden: Path) -> None:
    whole = (golden / "tiny-fp" / "safetensors-fp16" / "model.safetensors").read_bytes()
    path = tmp_path / "a.safetensors"
    for size in [*range(0, 4000, 10), *range(4000, len(whole), 9973), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"is cut short|is empty"):
            read_header(path)


def test_a_size_that_disagrees_is_told_with_both_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a", {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 12]}}, bytes(12))
    with pytest.raises(CheckpointError, match=r"a: w \(2, 3\) F32 needs 24 bytes, its data_offsets give it 12\."):
        read_header(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere is missing\. Is the path right"):
        read_header(tmp_path / "nowhere")
