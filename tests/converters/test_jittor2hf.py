"""Native back to Hugging Face; golden there-and-back is in test_hf2jittor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moss_folders import files_of, float_tensors, gptq_tensors, names_in, read_folder, write_folder

from moss_jt.checkpoint import Checkpoint
from moss_jt.converters import plan as plan_module
from moss_jt.converters.hf2jittor import hf2jittor
from moss_jt.converters.jittor2hf import jittor2hf
from moss_jt.converters.synth import preset_config, synthesize
from moss_jt.errors import CheckpointError, ConfigError
from moss_jt.layout import TileLayout
from moss_jt.packing import dequantize, unpack


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [16, 64, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_there_and_back(tmp_path: Path, bits: Any, group_size: int, act_order: bool) -> None:
    tensors = gptq_tensors(bits, group_size if group_size != 128 else 64, act_order=act_order)
    source = write_folder(tmp_path / "hf", tensors, wbits=bits, groupsize=group_size if group_size != 128 else 64)
    hf2jittor(source, tmp_path / "native")
    back = read_folder(jittor2hf(tmp_path / "native", tmp_path / "back").path)
    assert back.keys() == tensors.keys()
    for name, array in tensors.items():
        assert back[name].dtype == array.dtype, name
        assert np.array_equal(back[name].view(np.uint8), array.view(np.uint8)), name


def test_there_and_back_and_there_again_gives_the_same_files(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "a" / "m", gptq_tensors(4, 32, act_order=True), wbits=4, groupsize=32)
    first = hf2jittor(source, tmp_path / "a" / "native").path
    back = jittor2hf(first, tmp_path / "b" / "m").path
    second = hf2jittor(back, tmp_path / "b" / "native").path
    one, two = files_of(first), files_of(second)
    assert json.loads(one.pop("config.json")) == json.loads(two.pop("config.json"))
    assert one == two


def test_the_config_names_bits_and_groups(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", gptq_tensors(8, -1))  # not told there
    back = jittor2hf(hf2jittor(source).path, tmp_path / "back").path
    values = json.loads((back / "config.json").read_text())
    assert (values["wbits"], values["groupsize"], values["torch_dtype"]) == (8, -1, "float16")
    assert "moss_jt" not in values
    assert names_in(back) == ["config.json", "model.safetensors"]


def test_large_models_come_in_shards_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = float_tensors()
    native = hf2jittor(write_folder(tmp_path / "hf", tensors)).path
    monkeypatch.setattr(plan_module.foreign_files, "__defaults__", (100_000,))
    done = jittor2hf(native, tmp_path / "back")
    shards = sorted(done.path.glob("*.safetensors"))
    assert len(shards) > 1
    index = json.loads((done.path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    assert all(np.array_equal(array, tensors[name]) for name, array in read_folder(done.path).items())
    assert done.tensors == len(tensors)


def test_a_changed_source_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moss_jt.converters.journal import Workplace

    native = hf2jittor(write_folder(tmp_path / "hf", float_tensors())).path
    publish = Workplace.publish

    def stop(self: Workplace) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Workplace, "publish", stop)
    with pytest.raises(KeyboardInterrupt):
        jittor2hf(native, tmp_path / "back")
    monkeypatch.setattr(Workplace, "publish", publish)
    manifest = native / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(ConfigError, match=r"hf-jittor changed since the conversion began. Delete .*\.back\.partial"):
        jittor2hf(native, tmp_path / "back", resume=True)


def test_a_foreign_folder_is_not_native(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", float_tensors())
    with pytest.raises(CheckpointError, match=r"is not in the native format"):
        jittor2hf(source, tmp_path / "back")
    assert names_in(tmp_path) == ["hf"]


@pytest.mark.parametrize("piece", [1 << 15, 1 << 24])
@pytest.mark.parametrize("bits", [4, 16])
def test_a_quantised_head_becomes_floats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, piece: int
) -> None:
    monkeypatch.setattr("moss_jt.converters.jittor2hf.PIECE_BYTES", piece)
    checkpoint = Checkpoint.open(
        synthesize(preset_config("tiny", bits=bits, layers=1, head_bits=8), tmp_path / "m").path
    )
    layout = checkpoint.entries["lm_head.weight"].layout
    assert isinstance(layout, TileLayout)
    wanted = dequantize(unpack(checkpoint.read("lm_head.weight"), layout)).astype(np.float16)
    done = jittor2hf(checkpoint.path, tmp_path / "back")
    assert done.head == "float16"
    assert np.array_equal(read_folder(done.path)["lm_head.weight"], wanted)
    again = Checkpoint.open(hf2jittor(done.path, tmp_path / "again").path)
    assert again.config.head_quantization is None
    for name in again.entries.keys() - {"lm_head.weight"}:
        assert np.array_equal(again.read(name), checkpoint.read(name)), name
