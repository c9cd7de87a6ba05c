"""Hugging Face to native: the golden folders, dtypes, what is dropped and kept, disk room, files that come and go."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moss_folders import (
    Tensors,
    files_of,
    float_tensors,
    gptq_tensors,
    names_in,
    read_folder,
    write_folder,
    write_shards,
)
from safetensors.numpy import save_file

from moss_jt.checkpoint import Checkpoint, is_quantized_name
from moss_jt.config import MossConfig
from moss_jt.converters import conversion as module
from moss_jt.converters import plan as plan_module
from moss_jt.converters.hf2jittor import default_destination, hf2jittor
from moss_jt.converters.jittor2hf import jittor2hf
from moss_jt.converters.native_tensors import NativeMaker
from moss_jt.converters.source import open_source
from moss_jt.errors import CheckpointError, ConfigError, DiskError
from moss_jt.layout import RowsLayout, TileLayout
from moss_jt.packing import dequantize, unpack

FLOATS = ["tiny-fp/bin-2shards", "tiny-fp/safetensors-fp16", "tiny-fp/safetensors-bf16", "tiny-fp-h8/bin-single"]
GPTQ = [f"tiny-int{bits}/{kind}" for bits in (4, 8) for kind in ("g32", "g128")]
GPTQ += ["tiny-int4/g32-actorder", "tiny-int8/g128-actorder"]


def source_tensors(path: Path) -> Tensors:
    """What a source holds, causal masks left out."""
    with open_source(path) as source:
        return {name: source.read(name) for name in source.tensors if not name.endswith("causal_mask")}


@pytest.mark.parametrize("folder", FLOATS + GPTQ)
def test_golden_there_and_back(golden: Path, tmp_path: Path, folder: str) -> None:
    hf2jittor(golden / folder, tmp_path / "native")
    jittor2hf(tmp_path / "native", tmp_path / "back")
    wanted, found = source_tensors(golden / folder), source_tensors(tmp_path / "back")
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name
    ours = json.loads((golden / folder / "config.json").read_text())
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "moss_jt" not in back
    assert {key: back[key] for key in ours if key != "auto_map"} == {k: v for k, v in ours.items() if k != "auto_map"}


@pytest.mark.parametrize("folder", GPTQ)
def test_golden_weights_are_those_of_the_reference(golden: Path, tmp_path: Path, folder: str) -> None:
    checkpoint = Checkpoint.open(hf2jittor(golden / folder, tmp_path / "native").path)
    with np.load(golden / folder / "expected.npz") as expected:
        for name, entry in checkpoint.entries.items():
            if isinstance(entry.layout, TileLayout):
                weights = dequantize(unpack(checkpoint.read(name), entry.layout))
                wanted = expected[f"deq_{name.removesuffix('.weight')}"]  # rounded to float16
                assert np.array_equal(weights.astype(np.float16), wanted), name


def test_shards_and_single_files_give_the_same_bytes(tmp_path: Path) -> None:
    tensors = float_tensors()
    write_folder(tmp_path / "one" / "model", tensors)
    write_shards(tmp_path / "three" / "model", tensors, 3)
    first = files_of(hf2jittor(tmp_path / "one" / "model").path)
    second = files_of(hf2jittor(tmp_path / "three" / "model").path)
    assert first == second
    assert sorted(first) == [
        "config.json",
        "manifest.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    ]


def test_large_models_are_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module.native_files, "__defaults__", (40_000,))
    path = hf2jittor(write_folder(tmp_path / "hf", gptq_tensors(8, 32))).path
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(shard.name == f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i, shard in enumerate(shards, 1))
    checkpoint = Checkpoint.open(path)
    found = checkpoint.read("lm_head.weight")
    assert found[: 96 * 64 * 2].tobytes() == gptq_tensors(8, 32)["lm_head.weight"].tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("stored", ["float16", "float32", "float64"])
def test_floats_take_the_type_asked_for(tmp_path: Path, stored: str, dtype: Any) -> None:
    tensors = float_tensors(stored)
    done = hf2jittor(write_folder(tmp_path / "hf", tensors), dtype=dtype)
    assert done.config.dtype == dtype
    checkpoint = Checkpoint.open(done.path)
    for name in ("lm_head.weight", "transformer.h.1.ln_1.bias"):
        layout = checkpoint.entries[name].layout
        assert not isinstance(layout, TileLayout)
        assert layout.dtype == dtype
        size = int(np.prod(layout.shape)) * (4 if dtype == "float32" else 2)
        raw = checkpoint.read(name)[:size]
        if dtype == "bfloat16":
            found = (raw.view("<u2").astype("<u4") << 16).view("<f4")
            assert np.allclose(found, tensors[name].reshape(-1), rtol=2**-8)
        else:
            assert np.array_equal(raw.view(dtype), tensors[name].astype(dtype).reshape(-1))
    assert json.loads((done.path / "config.json").read_text())["torch_dtype"] == dtype


def test_every_tensor_keeps_its_own_type(tmp_path: Path) -> None:
    tensors = float_tensors()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float32)
    tensors["lm_head.bias"] = tensors["lm_head.bias"].astype(np.float32)
    done = hf2jittor(write_folder(tmp_path / "hf", tensors))
    assert done.config.dtype is None
    entries = Checkpoint.open(done.path).entries
    assert entries["lm_head.weight"].layout == RowsLayout((96, 64), "float32")
    back = read_folder(jittor2hf(done.path, tmp_path / "back").path)
    assert all(np.array_equal(back[name], array) and back[name].dtype == array.dtype for name, array in tensors.items())


def test_the_dtype_of_a_quantised_model_leaves_its_scales(tmp_path: Path) -> None:
    tensors = gptq_tensors(4, 32)
    done = hf2jittor(write_folder(tmp_path / "hf", tensors), dtype="float32")
    back = read_folder(jittor2hf(done.path, tmp_path / "back").path)
    assert back["lm_head.weight"].dtype == np.float32
    for name, array in tensors.items():
        if name.endswith(("qweight", "qzeros", "scales", "g_idx")):
            assert back[name].tobytes() == array.tobytes()


def test_double_precision_needs_a_type(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lm_head\.bias is float64, which needs --dtype"):
        hf2jittor(write_folder(tmp_path / "hf", float_tensors("float64")))


def test_numbers_too_large_for_the_type_are_named(tmp_path: Path) -> None:
    tensors = float_tensors("float32")
    tensors["transformer.h.0.mlp.fc_out.weight"][63, 255] = 1e6
    with pytest.raises(CheckpointError, match=r"fc_out\.weight\[63, 255\] is too large for float16"):
        hf2jittor(write_folder(tmp_path / "hf", tensors), dtype="float16")


@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.ln_f.bias"])
def test_numbers_that_are_not_finite_are_named(tmp_path: Path, name: str) -> None:
    tensors = float_tensors()
    tensors[name].reshape(-1)[-1] = np.nan
    last = ", ".join(str(size - 1) for size in tensors[name].shape)
    with pytest.raises(CheckpointError, match=rf"{name}\[{last}\] is NaN; weights must be finite"):
        hf2jittor(write_folder(tmp_path / "hf", tensors))
    assert names_in(tmp_path) == ["hf"]


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.float16])
def test_causal_masks_of_any_type_are_dropped_and_told(tmp_path: Path, dtype: Any) -> None:
    masks = {f"transformer.h.{i}.attn.causal_mask": np.ones((1, 1, 64, 64), dtype) for i in range(2)}
    done = hf2jittor(write_folder(tmp_path / "hf", {**float_tensors(), **masks}))
    assert (done.dropped, done.dropped_bytes) == (2, sum(mask.nbytes for mask in masks.values()))
    assert not any("causal_mask" in name for name in Checkpoint.open(done.path).entries)


def test_the_manifest_has_the_hash_of_every_tensor(tmp_path: Path) -> None:
    import hashlib

    path = hf2jittor(write_folder(tmp_path / "hf", gptq_tensors(8, 64, act_order=True))).path
    manifest = json.loads((path / "manifest.json").read_text())
    checkpoint = Checkpoint.open(path)
    assert manifest["tensors"].keys() == checkpoint.entries.keys()
    for name in checkpoint.entries:
        assert manifest["tensors"][name]["sha256"] == hashlib.sha256(checkpoint.read(name).tobytes()).hexdigest()


def test_the_config_keeps_the_originals_keys_but_not_its_code(tmp_path: Path) -> None:
    extra = {"auto_map": {"AutoConfig": "configuration_moss.MossConfig"}, "n_ctx": 64, "summary_type": "cls_index"}
    source = write_folder(tmp_path / "moss-plugin", float_tensors(), torch_dtype="float32", **extra)
    done = hf2jittor(source)
    values = json.loads((done.path / "config.json").read_text())
    assert values["n_ctx"] == 64
    assert values["summary_type"] == "cls_index"
    assert "auto_map" not in values
    assert values["torch_dtype"] == "float16"  # what the files hold
    assert values["moss_jt"]["version"] == 1
    assert done.config.name == "moss-plugin"
    assert done.config.template == "fields"
    assert MossConfig.from_file(done.path / "config.json") == done.config


def test_the_tokenizer_comes_along_and_code_does_not(golden: Path, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", float_tensors())
    for file in (golden / "tokenizer" / "c-addedtoken-specials").iterdir():
        if file.name != "expected.json":
            shutil.copy(file, source)
    (source / "tokenization_moss.py").write_text("raise SystemExit")
    path = hf2jittor(source).path
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"):
        assert (path / name).read_bytes() == (source / name).read_bytes()
    assert not (path / "tokenization_moss.py").exists()
    back = jittor2hf(path, tmp_path / "back").path
    assert (back / "vocab.json").read_bytes() == (source / "vocab.json").read_bytes()


def test_default_destination_lies_beside(tmp_path: Path) -> None:
    (tmp_path / "m.v1").mkdir()
    assert default_destination(tmp_path / "m.v1") == tmp_path / "m.v1-jittor"
    (tmp_path / "x.bin").touch()
    assert default_destination(tmp_path / "x.bin") == tmp_path / "x-jittor"


def test_a_taken_destination_is_left_alone(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", float_tensors())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    with pytest.raises(ConfigError, match=r"taken exists already. Choose another name or delete it"):
        hf2jittor(source, tmp_path / "taken")
    assert names_in(tmp_path / "taken") == ["mine"]
    assert names_in(tmp_path) == ["hf", "taken"]
    (tmp_path / "empty").mkdir()
    assert Checkpoint.open(hf2jittor(source, tmp_path / "empty").path).entries


def test_too_little_room_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folder(tmp_path / "hf", float_tensors())
    real = os.statvfs(tmp_path)
    fields = list(real)
    fields[4] = 100_000 // real.f_frsize  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))
    for way_out in ("", ", or add --delete-source"):
        with pytest.raises(DiskError, match=rf"hf-jittor needs 0\.23 MB more; 0\.10 MB are free .* MB{way_out}\.$"):
            hf2jittor(source, way_out=way_out)
    assert names_in(tmp_path) == ["hf"]


def test_deleting_the_source_on_the_way_needs_less_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_shards(tmp_path / "hf", float_tensors(), 5)
    total = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    asked: list[int] = []
    monkeypatch.setattr(module, "check_room", lambda _place, needed, _hint="": asked.append(needed))
    hf2jittor(source, tmp_path / "a")
    hf2jittor(source, tmp_path / "b", delete_source=True)
    assert asked[0] >= total
    assert asked[1] < 0.6 * total


def test_the_source_is_deleted_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_shards(tmp_path / "hf", float_tensors(), 4)
    total = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    left: list[int] = []
    make = NativeMaker.make

    def watch(*args: Any) -> Any:
        left.append(len(list(source.glob("*.safetensors"))))
        return make(*args)

    monkeypatch.setattr(NativeMaker, "make", watch)
    done = hf2jittor(source, delete_source=True)
    assert left == sorted(left, reverse=True)
    assert set(left) == {4, 3, 2, 1}
    assert done.deleted_bytes == total
    assert names_in(source) == ["config.json"]
    assert read_folder(jittor2hf(done.path, tmp_path / "back").path).keys() == float_tensors().keys()


def test_a_single_file_is_converted_and_deleted_alone(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", float_tensors())
    (source / "pytorch_model.bin.index.json").write_text("of somebody else")
    done = hf2jittor(source / "model.safetensors", delete_source=True)
    assert done.path == source / "model-jittor"
    assert names_in(source) == ["config.json", "model-jittor", "pytorch_model.bin.index.json"]


def test_a_folder_where_nothing_may_be_deleted_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It failed in the middle, and again with --resume."""
    source = write_shards(tmp_path / "hf", float_tensors(), 2)
    monkeypatch.setattr(os, "access", lambda path, mode: path != source or not mode & os.W_OK)
    with pytest.raises(
        ConfigError, match=r"may not delete anything in .*hf: it is read-only for you\. Convert without"
    ):
        hf2jittor(source, tmp_path / "native", delete_source=True)
    assert names_in(tmp_path) == ["hf"]


def test_a_file_that_cannot_be_deleted_is_told_with_the_way_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_shards(tmp_path / "hf", float_tensors(), 2)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(DiskError, match=r"cannot be deleted: .* --resume without --delete-source goes on\.$"):
            hf2jittor(source, tmp_path / "native", delete_source=True)
    assert hf2jittor(source, tmp_path / "native", resume=True).resumed > 0


def test_the_index_of_another_format_stays(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "hf", float_tensors(), 2)
    (source / "pytorch_model.bin.index.json").write_text("{}")
    hf2jittor(source, tmp_path / "native", delete_source=True)
    assert names_in(source) == ["config.json", "pytorch_model.bin.index.json"]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """As GBK has them."""
    folder = tmp_path / os.fsdecode("模型".encode("gbk"))
    source = write_folder(folder / os.fsdecode("莫斯".encode("gbk")), float_tensors())
    weights = source / os.fsdecode("权重".encode("gbk") + b".safetensors")
    (source / "model.safetensors").rename(weights)
    checkpoint = Checkpoint.open(hf2jittor(weights, folder / "a").path)
    assert files_of(hf2jittor(source, folder / "b").path).keys() == files_of(folder / "a").keys()
    assert str(checkpoint.config.name).isprintable()
    assert len(checkpoint.entries) == 21


def test_links_are_not_deleted(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", float_tensors())
    (source / "model.safetensors").rename(tmp_path / "blob")
    (source / "model.safetensors").symlink_to(tmp_path / "blob")
    with pytest.raises(ConfigError, match=r"model\.safetensors is a symbolic link. Convert without it"):
        hf2jittor(source, delete_source=True)
    assert (tmp_path / "blob").exists()
    assert Checkpoint.open(hf2jittor(source).path).entries


def bring_from(store: Path, arrived: list[str]) -> Callable[[Path], None]:
    """Somebody who brings a file when it is asked for."""

    def arrive(path: Path) -> None:
        arrived.append(path.name)
        shutil.copy(store / path.name, path)

    return arrive


def test_files_are_asked_for_when_they_are_needed(tmp_path: Path) -> None:
    tensors = float_tensors()
    whole = write_shards(tmp_path / "store", tensors, 4)
    source = tmp_path / "hf"
    shutil.copytree(whole, source)
    shards = sorted(file.name for file in source.glob("*.safetensors"))
    for name in shards[1:]:
        (source / name).unlink()
    arrived: list[str] = []
    bring = bring_from(whole, arrived)

    def arrive(path: Path) -> None:
        assert not list(source.glob("*.safetensors")), "what came before is used up and deleted"
        bring(path)

    done = hf2jittor(source, arrive=arrive, delete_source=True)
    assert arrived == shards[1:]
    found = read_folder(jittor2hf(done.path, tmp_path / "back").path)
    assert all(np.array_equal(found[name], array) for name, array in tensors.items())
    assert names_in(source) == ["config.json"]


def test_a_quantised_source_is_fetched_before_it_is_planned(tmp_path: Path) -> None:
    tensors = gptq_tensors(4, 32, act_order=True)
    whole = write_shards(tmp_path / "store", tensors, 3)
    shutil.copytree(whole, tmp_path / "hf")
    last = sorted((tmp_path / "hf").glob("*.safetensors"))[-1]
    last.unlink()
    arrived: list[str] = []
    done = hf2jittor(tmp_path / "hf", arrive=bring_from(whole, arrived))
    assert arrived == [last.name]
    assert read_folder(jittor2hf(done.path, tmp_path / "back").path).keys() == tensors.keys()


def test_what_arrives_must_be_what_was_planned(tmp_path: Path) -> None:
    tensors = float_tensors()
    whole = write_shards(tmp_path / "store", tensors, 2)
    shutil.copytree(whole, tmp_path / "hf")
    last = sorted((tmp_path / "hf").glob("*.safetensors"))[-1]
    held = [
        name
        for name in tensors
        if json.loads((whole / "model.safetensors.index.json").read_text())["weight_map"][name] == last.name
    ]
    last.unlink()
    save_file({name: tensors[name].astype(np.float32) for name in held}, whole / last.name)
    with pytest.raises(CheckpointError, match=r"is float32, but float16 was expected from the files before"):
        hf2jittor(tmp_path / "hf", arrive=bring_from(whole, []))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "hf", float_tensors(), 3)
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors.* missing"):
        hf2jittor(source)
    assert names_in(tmp_path) == ["hf"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_layer": 10**9}, "asks for 1000000000 layers"),
        ({"n_layer": 3}, r"transformer\.h\.2\.attn\.qkv_proj\.weight is missing"),
        ({"n_embd": 128}, r"transformer\.wte\.weight is \(96, 64\), the config asks for \(96, 128\)"),
        ({"n_head": 6}, "n_embd 64 is not divisible by n_head 6"),
        ({"n_embd": "64"}, "n_embd is '64'"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
    ],
)
def test_configs_of_other_models(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    source = write_folder(tmp_path / "hf", float_tensors(), **change)
    with pytest.raises((CheckpointError, ConfigError), match=words):
        hf2jittor(source)
    assert names_in(tmp_path) == ["hf"]


def test_a_native_folder_needs_no_conversion(tmp_path: Path) -> None:
    native = hf2jittor(write_folder(tmp_path / "hf", float_tensors())).path
    with pytest.raises(ConfigError, match=r"hf-jittor is in the native format already"):
        hf2jittor(native)


def test_a_billion_layers_in_a_folder_that_is_not_whole(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "hf", float_tensors(), 3, n_layer=10**9)
    (source / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"asks for 1000000000 layers"):
        hf2jittor(source, arrive=bring_from(tmp_path, []))


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folder(tmp_path / "hf", float_tensors())

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / ".x.partial"))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        DiskError, match=r"\.x\.partial cannot be written: Permission denied. Give a folder that you may"
    ):
        hf2jittor(source, tmp_path / "x")


def test_only_the_block_matrices_are_quantised(tmp_path: Path) -> None:
    path = hf2jittor(write_folder(tmp_path / "hf", gptq_tensors(4, -1))).path
    for name, entry in Checkpoint.open(path).entries.items():
        assert isinstance(entry.layout, TileLayout) == is_quantized_name(name)
