"""Native folders: what is opened agrees with the config, and everything that does not is named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moss_folders import float_tensors, gptq_tensors, write_folder

from moss_jt.checkpoint import LAYOUTS_KEY, Checkpoint, expected_shapes, is_native, is_quantized_name
from moss_jt.config import MossConfig
from moss_jt.converters.hf2jittor import hf2jittor
from moss_jt.converters.synth import preset_config, synthesize
from moss_jt.errors import CheckpointError, ConfigError, DiskError, ShapeError
from moss_jt.layout import ALIGNMENT, PlainLayout, RowsLayout, TileLayout

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def native(tmp_path: Path) -> Path:
    return hf2jittor(write_folder(tmp_path / "hf", float_tensors()), tmp_path / "native").path


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    source = write_folder(tmp_path / "hf4", gptq_tensors(4, 32), wbits=4, groupsize=32)
    return hf2jittor(source, tmp_path / "native4").path


def change_header(folder: Path, change: Any) -> None:
    """Rewrite the JSON header of the only weight file; its length stays."""
    file = folder / SHARD
    raw = bytearray(file.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length, "the changed header fits into the old one's padding"
    raw[8 : 8 + length] = text.ljust(length)
    file.write_bytes(raw)


def change_layout(folder: Path, name: str, **values: Any) -> None:
    """Change the description of one matrix."""

    def change(header: dict[str, Any]) -> None:
        layouts = json.loads(header["__metadata__"][LAYOUTS_KEY])
        layouts[name].update(values)
        header["__metadata__"][LAYOUTS_KEY] = json.dumps(layouts)

    change_header(folder, change)


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_names_and_shapes_are_those_of_the_original() -> None:
    config = MossConfig(n_embd=6144, n_head=24, n_layer=34)
    shapes = expected_shapes(config)
    assert len(shapes) == 34 * 8 + 5
    assert shapes["transformer.h.33.attn.qkv_proj.weight"] == (18432, 6144)
    assert shapes["transformer.h.0.mlp.fc_out.weight"] == (6144, 24576)
    assert shapes["lm_head.bias"] == (107008,)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 16_717_980_160
    assert sum(map(is_quantized_name, shapes)) == 34 * 4
    assert not is_quantized_name("lm_head.weight")


def test_entries_have_their_layouts_and_lie_on_pages(native: Path, quantized: Path) -> None:
    checkpoint = Checkpoint.open(native)
    assert list(checkpoint.entries) == list(expected_shapes(checkpoint.config))
    assert isinstance(checkpoint.entries["transformer.wte.weight"].layout, RowsLayout)
    assert checkpoint.entries["lm_head.bias"].layout == PlainLayout((96,), "float16")
    entries = Checkpoint.open(quantized).entries
    assert entries["transformer.h.1.mlp.fc_out.weight"].layout == TileLayout((64, 256), 4, 32)
    assert isinstance(entries["lm_head.weight"].layout, RowsLayout)
    for entry in entries.values():
        if not isinstance(entry.layout, PlainLayout):
            assert entry.offset % ALIGNMENT == 0 == entry.nbytes % ALIGNMENT
    last_blob = max(e.offset for e in entries.values() if not isinstance(e.layout, PlainLayout))
    assert all(e.offset > last_blob for e in entries.values() if isinstance(e.layout, PlainLayout))


def test_bytes_are_read_whole_and_in_parts(native: Path) -> None:
    checkpoint = Checkpoint.open(native)
    name = "transformer.h.0.attn.qkv_proj.weight"
    wanted = float_tensors()[name]
    whole = checkpoint.read(name)
    assert whole[: wanted.nbytes].tobytes() == wanted.tobytes()
    out = np.empty(100, np.uint8)
    assert checkpoint.read(name, start=50, nbytes=100, out=out) is out
    assert np.array_equal(out, whole[50:150])
    bias = checkpoint.read_plain("lm_head.bias")
    assert bias.dtype == np.float32
    assert np.array_equal(bias, float_tensors()["lm_head.bias"].astype(np.float32))


def test_wrong_ranges_and_names_are_refused(native: Path) -> None:
    checkpoint = Checkpoint.open(native)
    with pytest.raises(CheckpointError, match=r"has no tensor transformer\.nothing"):
        checkpoint.read("transformer.nothing")
    with pytest.raises(ShapeError, match=r"bytes 190 to 202 are not inside lm_head.bias, which has 192"):
        checkpoint.read("lm_head.bias", start=190, nbytes=12)
    floats: Any = np.empty(48, np.float32)
    with pytest.raises(ShapeError, match=r"out is float32 of 192 bytes; 192 contiguous uint8 are to be read"):
        checkpoint.read("lm_head.bias", out=floats)
    with pytest.raises(ShapeError, match=r"lm_head\.weight is a matrix"):
        checkpoint.read_plain("lm_head.weight")


def test_a_file_cut_after_opening_is_named_with_the_place(native: Path) -> None:
    checkpoint = Checkpoint.open(native)
    entry = checkpoint.entries["transformer.h.1.mlp.fc_in.weight"]
    os.truncate(entry.file, entry.offset + 100)
    with pytest.raises(CheckpointError, match=rf"{SHARD} .* ends at {entry.offset + 100}"):
        checkpoint.read(entry.name)
    entry.file.unlink()
    with pytest.raises(CheckpointError, match=f"{SHARD} is missing"):
        checkpoint.read(entry.name)


def test_a_failing_disk_is_a_disk_error(native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(native)

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    offset = checkpoint.entries["lm_head.bias"].offset
    with pytest.raises(DiskError, match=rf"cannot be read at byte {offset}: Input/output error"):
        checkpoint.read("lm_head.bias")


def test_missing_unexpected_and_misshapen_tensors_are_all_named(native: Path) -> None:
    change_config(native, n_layer=3, vocab_size=97)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(native)
    for words in (
        "transformer.h.2.ln_1.weight is missing",
        "transformer.h.2.mlp.fc_out.bias is missing",
        "transformer.wte.weight is (96, 64), the config asks for (97, 64)",
        "lm_head.bias is (96,), the config asks for (97,)",
        "Is config.json from another checkpoint?",
    ):
        assert words in str(caught.value)
    change_config(native, n_layer=1, vocab_size=96)
    with pytest.raises(CheckpointError, match=r"transformer\.h\.1\.ln_1\.bias is not expected"):
        Checkpoint.open(native)


def test_a_config_of_a_billion_layers_is_refused_at_once(native: Path) -> None:
    change_config(native, n_layer=10**9)
    with pytest.raises(CheckpointError, match=r"asks for 1000000000 layers of 8 tensors; the files hold 21 tensors"):
        Checkpoint.open(native)


def test_quantisation_must_be_that_of_the_config(native: Path, quantized: Path) -> None:
    ours = json.loads((quantized / "config.json").read_text())["moss_jt"]
    change_config(quantized, moss_jt={**ours, "quantization": {"bits": 8, "group_size": 32}})
    with pytest.raises(CheckpointError, match=r"qkv_proj.weight is int4 in groups of 32, the config asks for int8"):
        Checkpoint.open(quantized)
    change_config(quantized, moss_jt={**ours, "quantization": None})
    with pytest.raises(CheckpointError, match=r"is int4 in groups of 32, the config asks for floats"):
        Checkpoint.open(quantized)
    ours = json.loads((native / "config.json").read_text())["moss_jt"]
    change_config(native, moss_jt={**ours, "quantization": {"bits": 4, "group_size": -1}})
    with pytest.raises(
        CheckpointError, match=r"fc_out.weight is float16 rows, the config asks for int4 in groups of 256"
    ):
        Checkpoint.open(native)


def test_a_quantised_head_is_what_the_config_says_and_makes_version_2(tmp_path: Path) -> None:
    folder = synthesize(preset_config("tiny", bits=4, layers=1, head_bits=8), tmp_path / "m").path
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.entries["lm_head.weight"].layout == TileLayout((272, 256), 8, 128)
    assert isinstance(checkpoint.entries["transformer.wte.weight"].layout, RowsLayout)
    raw = (folder / SHARD).read_bytes()
    assert json.loads(raw[8:4096])["__metadata__"]["version"] == "2"
    ours = json.loads((folder / "config.json").read_text())["moss_jt"]
    assert ours["version"] == json.loads((folder / "manifest.json").read_text())["version"] == 2
    change_config(folder, moss_jt={**ours, "head_quantization": {"bits": 4, "group_size": 128}})
    with pytest.raises(CheckpointError, match=r"lm_head.weight is int8 in groups of 128, the config asks for int4"):
        Checkpoint.open(folder)
    change_config(folder, moss_jt={**ours, "head_quantization": None})
    with pytest.raises(CheckpointError, match=r"lm_head.weight is int8 in groups of 128, the config asks for floats"):
        Checkpoint.open(folder)


def test_the_embedding_is_never_quantised(tmp_path: Path) -> None:
    folder = synthesize(preset_config("tiny", layers=1, head_bits=8), tmp_path / "m").path

    def exchange(header: dict[str, Any]) -> None:
        one, other = header["transformer.wte.weight"], header["lm_head.weight"]
        header["transformer.wte.weight"], header["lm_head.weight"] = other, one
        layouts = json.loads(header["__metadata__"][LAYOUTS_KEY])
        names = {"transformer.wte.weight": "lm_head.weight", "lm_head.weight": "transformer.wte.weight"}
        swapped = {names.get(name, name): layout for name, layout in layouts.items()}
        header["__metadata__"][LAYOUTS_KEY] = json.dumps(swapped)

    change_header(folder, exchange)
    with pytest.raises(CheckpointError, match=r"wte.weight is int8 in groups of 128, the config asks for floats"):
        Checkpoint.open(folder)


def test_newer_versions_are_refused(native: Path) -> None:
    ours = json.loads((native / "config.json").read_text())["moss_jt"]
    assert ours["version"] == 1, "what an older program can read says so"
    change_header(native, lambda header: header["__metadata__"].update(version="3"))
    with pytest.raises(CheckpointError, match=r"has version 3 of the native format; this program reads up to 2"):
        Checkpoint.open(native)
    change_header(native, lambda header: header["__metadata__"].update(version="x"))
    with pytest.raises(CheckpointError, match=r"has version 'x' in its metadata"):
        Checkpoint.open(native)
    change_config(native, moss_jt={**ours, "version": 3})
    with pytest.raises(ConfigError, match=r"version 3; this program reads up to 2. Update moss-jt"):
        Checkpoint.open(native)


def test_broken_descriptions_are_named(native: Path, quantized: Path) -> None:
    name = "transformer.h.0.attn.out_proj.weight"
    change_layout(quantized, name, layout="tile99")
    with pytest.raises(CheckpointError, match=f"{name}: layout 'tile99' is not known"):
        Checkpoint.open(quantized)
    change_layout(quantized, name, layout="tile16", shape=[64, 640])
    with pytest.raises(CheckpointError, match=rf"{name} is U8 \[4096\]; its layout needs U8 \[24576\]"):
        Checkpoint.open(quantized)
    change_header(native, lambda header: header["__metadata__"].update(format="pt"))
    with pytest.raises(CheckpointError, match=r"has format 'pt' in its metadata where 'moss-jt' was expected"):
        Checkpoint.open(native)


def test_an_index_must_agree_and_stay_inside(native: Path) -> None:
    index = native / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**weight_map, "lm_head.bias": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"which is not the name of a file of its folder"):
        Checkpoint.open(native)
    index.write_text(json.dumps({"weight_map": {**weight_map, "lm_head.bias": "other.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lacks other.safetensors, which its index names"):
        Checkpoint.open(native)
    del weight_map["lm_head.bias"]
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"disagree about: lm_head.bias"):
        Checkpoint.open(native)
    index.unlink()
    with pytest.raises(CheckpointError, match=r"no weights"):
        Checkpoint.open(native)


def test_native_folders_are_told_from_others(native: Path, tmp_path: Path) -> None:
    assert is_native(native)
    assert not is_native(tmp_path / "hf")
    assert not is_native(tmp_path / "nothing")
    (tmp_path / "hf" / "config.json").write_text("[" * 100_000)
    assert not is_native(tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"config.json"):
        Checkpoint.open(tmp_path / "hf")


def test_a_foreign_folder_is_sent_to_the_converter(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", float_tensors())
    with pytest.raises(
        CheckpointError, match=f"not in the native format. Convert it with: moss-convert hf2jittor {folder}"
    ):
        Checkpoint.open(folder)
