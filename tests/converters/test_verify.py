"""Every byte that changes is found, and the tensor or file named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from moss_folders import float_tensors, gptq_tensors, write_folder

from moss_jt.checkpoint import Checkpoint
from moss_jt.converters.hf2jittor import hf2jittor
from moss_jt.converters.synth import preset_config, synthesize
from moss_jt.converters.verify import verify
from moss_jt.errors import CheckpointError
from moss_jt.layout import TileLayout


@pytest.fixture
def native(tmp_path: Path) -> Path:
    return hf2jittor(write_folder(tmp_path / "hf", gptq_tensors(4, 32, act_order=True)), tmp_path / "native").path


def overwrite(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(data)


def rehash(folder: Path, name: str) -> None:
    """Make the manifest agree with a changed tensor, as somebody careless or wicked could."""
    manifest = json.loads((folder / "manifest.json").read_text())
    found = hashlib.sha256(Checkpoint.open(folder).read(name).tobytes()).hexdigest()
    manifest["tensors"][name]["sha256"] = found
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_what_was_written_is_right(native: Path, tmp_path: Path) -> None:
    found = verify(native)
    assert found.tensors == 21
    assert found.nbytes == sum(entry.nbytes for entry in Checkpoint.open(native).entries.values())
    random = synthesize(preset_config("tiny", bits=8), tmp_path / "synth").path
    assert verify(random).files == 6  # the header of one file, five of the tokenizer


@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.1.mlp.fc_in.weight", "lm_head.bias"])
def test_one_bit_in_a_tensor(native: Path, name: str) -> None:
    entry = Checkpoint.open(native).entries[name]
    data = entry.file.read_bytes()
    overwrite(entry.file, entry.offset + 5, bytes([data[entry.offset + 5] ^ 1]))
    with pytest.raises(CheckpointError, match=rf"{name} is not what was written \(SHA-256 [0-9a-f]{{12}}…"):
        verify(native)


def test_one_byte_of_padding_in_the_header(native: Path) -> None:
    file = native / "model-00001-of-00001.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    overwrite(file, 8 + length - 1, b"\n")
    with pytest.raises(CheckpointError, match=r"the header has changed since it was written"):
        verify(native)


def test_a_changed_tokenizer(tmp_path: Path) -> None:
    path = synthesize(preset_config("tiny"), tmp_path / "synth").path
    (path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(CheckpointError, match=r"merges\.txt has changed since it was written"):
        verify(path)
    (path / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"merges\.txt is missing"):
        verify(path)


def test_numbers_that_are_not_finite_even_if_hashed(native: Path) -> None:
    entry = Checkpoint.open(native).entries["transformer.wte.weight"]
    overwrite(entry.file, entry.offset + 2 * 65, b"\x00\x7e")
    rehash(native, entry.name)
    with pytest.raises(CheckpointError, match=r"transformer\.wte\.weight\[1, 1\] is NaN"):
        verify(native)


def test_scales_that_are_not_finite_even_if_hashed(native: Path) -> None:
    entry = Checkpoint.open(native).entries["transformer.h.0.attn.out_proj.weight"]
    assert isinstance(entry.layout, TileLayout)
    overwrite(entry.file, entry.offset + entry.layout.tile_bytes + entry.layout.code_bytes + 2 * 17, b"\x00\xfc")
    rehash(native, entry.name)
    with pytest.raises(CheckpointError, match=r"out_proj\.weight scale of tile\[1, 17\] is -inf"):
        verify(native)


def test_a_permutation_that_is_none_even_if_hashed(native: Path) -> None:
    entry = Checkpoint.open(native).entries["transformer.h.0.attn.out_proj.weight"]
    assert isinstance(entry.layout, TileLayout)
    overwrite(entry.file, entry.offset + entry.layout.perm_offset, (9999).to_bytes(4, "little"))
    rehash(native, entry.name)
    with pytest.raises(CheckpointError, match=r"out_proj\.weight: the permutation of a matrix does not name each"):
        verify(native)


def test_broken_manifests(native: Path) -> None:
    file = native / "manifest.json"
    good = json.loads(file.read_text())
    cases = [
        ({**good, "version": 3}, "has version 3; this program reads up to 2"),
        ({**good, "format": "x"}, "is not a manifest of moss-jt"),
        ({**good, "headers": {}}, "does not name the weight files"),
        ({**good, "tensors": {}}, "disagree about: lm_head.bias, lm_head.weight"),
        ({**good, "tensors": {"a": 1}}, "has no checksum for a"),
        ({**good, "others": {"../x": "0"}}, "names '../x', which is not a file of its folder"),
        ({"format": "moss-jt", "version": 1}, "lacks its checksums"),
    ]
    for values, words in cases:
        file.write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=words):
            verify(native)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        verify(native)


def test_a_large_tensor_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moss_jt.converters.verify.PIECE_BYTES", 4096)
    floats = hf2jittor(write_folder(tmp_path / "fp", float_tensors())).path
    words = hf2jittor(write_folder(tmp_path / "int8", gptq_tensors(8, 16, act_order=True))).path
    assert verify(floats).tensors == verify(words).tensors == 21


def test_a_quantised_head(tmp_path: Path) -> None:
    path = synthesize(preset_config("tiny", layers=1, head_bits=8), tmp_path / "m").path
    assert verify(path).tensors == 13
    entry = Checkpoint.open(path).entries["lm_head.weight"]
    assert isinstance(entry.layout, TileLayout)
    overwrite(entry.file, entry.offset + entry.layout.code_bytes + 2, b"\x00\x7e")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight scale of tile\[0, 1\] is NaN"):
        verify(path)
    overwrite(entry.file, entry.offset + entry.layout.code_bytes + 2, b"\x00\x00")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not what was written"):
        verify(path)
