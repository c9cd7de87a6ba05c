"""Torch's two file formats, against files that torch wrote (data/make.py) and what torch read back from them."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from fake_torch import call, code, legacy_file, pickled, storage, tensor, zip_file

from moss_jt.checked_file import CheckedFile
from moss_jt.converters.source import open_source
from moss_jt.converters.strided import StoredTensor, read_tensor
from moss_jt.converters.torch_file import read_torch_file
from moss_jt.errors import CheckpointError

HERE = Path(__file__).parent / "data"
EXPECTED = json.loads((HERE / "expected.json").read_text())


@pytest.mark.parametrize("name", sorted(EXPECTED["files"]))
def test_reads_what_torch_reads(name: str) -> None:
    expected = EXPECTED["contents"][EXPECTED["files"][name]]
    with open_source(HERE / name) as source:
        assert source.tensors.keys() == expected.keys()
        for key, (dtype, shape, data) in expected.items():
            found = source.tensors[key]
            assert (found.dtype, list(found.shape), found.nbytes) == (dtype, shape, len(data) // 2)
            array = source.read(key)
            assert array.shape == tuple(shape)
            assert array.tobytes().hex() == data
            assert source.read_bytes(key, 0, found.nbytes).hex() == data


@pytest.mark.parametrize("name", ["zip.bin", "legacy.bin"])
def test_views_can_be_read_in_pieces(name: str) -> None:
    with open_source(HERE / name) as source:
        for key in ("transposed", "plain", "permuted", "stepped", "expanded"):
            whole = source.read(key).tobytes()
            pieces = [bytes(source.read_bytes(key, at, min(5, len(whole) - at))) for at in range(0, len(whole), 5)]
            assert b"".join(pieces) == whole


@pytest.mark.parametrize("name", ["zip.bin", "legacy.bin"])
def test_every_cut_is_noticed(name: str, tmp_path: Path) -> None:
    whole = (HERE / name).read_bytes()
    path = tmp_path / name
    for size in range(0, len(whole), 10):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError) as caught:
            open_source(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


def test_large_views_are_put_in_order_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moss_jt.converters.strided._PIECE_BYTES", 64)
    numbers = np.arange(4 * 5 * 6 * 7, dtype="<i4")
    path = tmp_path / "numbers"
    path.write_bytes(b"head" + numbers.tobytes())
    block = numbers.reshape(4, 5, 6, 7)
    for axes in [(3, 1, 0, 2), (0, 2, 1, 3), (2, 3, 0, 1), (3, 2, 1, 0)]:
        view = block.transpose(axes)[1::2, :, ::3]
        start = 4 + int(view.__array_interface__["data"][0] - numbers.__array_interface__["data"][0])
        stored = StoredTensor("int32", view.shape, tuple(step // 4 for step in view.strides), start)
        with CheckedFile(path) as file:
            assert np.array_equal(read_tensor(file, stored), view)


def test_zip64_sizes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (("a/data.pkl", pickled({"w": tensor((4,))})), ("a/data/0", bytes(range(8)))):
            with archive.open(name, "w", force_zip64=True) as record:
                record.write(data)
    with open_source(path) as source:
        assert source.read("w").tobytes() == bytes(range(8))


def test_storages_beyond_4_gib_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    count = (4 << 30) + 6
    description = pickled({"big": tensor((count,), kind="ByteStorage", count=count), "end": tensor((4,), key="1")})
    data = bytes(range(8))
    with path.open("wb") as file:  # the large storage is a hole in the file
        places = []
        for name, content, size in (
            ("a/data.pkl", description, None),
            ("a/data/0", b"", count),
            ("a/data/1", data, None),
        ):
            places.append((name, file.tell(), len(content) if size is None else size))
            file.write(struct.pack("<4s5H3I2H", b"PK\x03\x04", 45, 8, 0, 0, 0, 0, 0, 0, len(name), 0) + name.encode())
            file.write(content)
            file.seek(places[-1][1] + 30 + len(name) + places[-1][2])
        start = file.tell()
        for name, offset, size in places:
            wide = struct.pack("<2H3Q", 1, 24, size, size, offset)
            full = 0xFFFFFFFF
            fields = (b"PK\x01\x02", 45, 45, 8, 0, 0, 0, 0, full, full, len(name), len(wide), 0, 0, 0, 0, full)
            file.write(struct.pack("<4s6H3I5H2I", *fields) + name.encode() + wide)
        size = file.tell() - start
        end64 = file.tell()
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 3, 3, size, start))
        file.write(struct.pack("<4sIQI", b"PK\x06\x07", 0, end64, 1))
        file.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
    with open_source(path) as source:
        assert source.tensors["big"].nbytes == count
        assert bytes(source.read_bytes("big", count - 3, 3)) == bytes(3)
        assert source.read("end").tobytes() == data


def test_a_wrong_zip64_end_record_is_noticed(tmp_path: Path) -> None:
    good = zip_file(pickled({"w": tensor((4,))}), {"0": bytes(8)})
    at = good.rfind(b"PK\x05\x06")
    path = tmp_path / "a.bin"
    path.write_bytes(good[:at] + struct.pack("<4sIQI", b"PK\x06\x07", 0, 0, 1) + good[at:])
    with pytest.raises(CheckpointError, match="its zip64 end record is not where it should be"):
        open_source(path)


def test_parameters_sizes_and_the_oldest_tensors(tmp_path: Path) -> None:
    oldest = call("torch._utils._rebuild_tensor", storage("HalfStorage", "0", 4), 1, call("torch.Size", (3,)), (1,))
    description = {"parameter": call("torch._utils._rebuild_parameter", tensor((2, 2)), True, {}), "oldest": oldest}
    path = tmp_path / "a.bin"
    for data in (
        zip_file(pickled(description), {"0": bytes(range(8))}),
        legacy_file(pickled(description), {"0": bytes(range(8))}),
    ):
        path.write_bytes(data)
        with open_source(path) as source:
            assert list(source.tensors) == ["parameter", "oldest"]
            assert source.read("parameter").tobytes() == bytes(range(8))
            assert source.read("oldest").tobytes() == bytes(range(2, 8))


def test_an_ordered_dict_may_be_written_as_a_list_of_pairs(tmp_path: Path) -> None:
    pairs = call("collections.OrderedDict", [["a", tensor((4,))], ("b", tensor((2,)))])
    path = tmp_path / "a.bin"
    path.write_bytes(zip_file(pickled(pairs), {"0": bytes(8)}))
    with CheckedFile(path) as file:
        assert list(read_torch_file(file)) == ["a", "b"]


def test_expanded_tensors_are_read_while_they_are_small(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(zip_file(pickled({"w": tensor((3, 4), stride=(0, 1))}), {"0": bytes(range(8))}))
    with open_source(path) as source:
        assert source.read("w").tobytes() == bytes(range(8)) * 3
    path.write_bytes(zip_file(pickled({"w": tensor((1 << 23, 4), stride=(0, 1))}), {"0": bytes(8)}))
    with pytest.raises(
        CheckpointError, match=r"w \(8388608, 4\) would have 67108864 bytes, but the file stores only 8"
    ):
        open_source(path)


def test_refusals_name_the_thing_and_come_before_the_file_is_used(tmp_path: Path) -> None:
    path = tmp_path / "evil.bin"
    evil = b"\x80\x02" + code({"a": tensor((4,))}) + call("os.system", "true") + b"."
    path.write_bytes(zip_file(evil, {"0": bytes(8)}))
    words = (
        r'evil\.bin asks to run "os\.system" while loading; a checkpoint holds only tensors\. Do not use this file\.$'
    )
    with pytest.raises(CheckpointError, match=words):
        open_source(path)
