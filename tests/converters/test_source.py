"""A foreign checkpoint as one table: every layout of files gives the same tensors, read whole or in pieces."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_torch import pickled, tensor, zip_file

from moss_jt.converters.source import open_source
from moss_jt.errors import CheckpointError, ConfigError, DiskError, ShapeError

QUANTIZED = [
    "tiny-int4/g32",
    "tiny-int4/g128",
    "tiny-int4/g32-actorder",
    "tiny-int8/g32",
    "tiny-int8/g128",
    "tiny-int8/g128-actorder",
]
SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


def shard(folder: Path, name: str, *tensors: str, data: bytes = bytes(range(8))) -> None:
    """A .bin file that holds tensors of these names."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(zip_file(pickled({key: tensor((4,)) for key in tensors}), {"0": data}))
    (folder / "config.json").write_text("{}")


def test_shards_and_safetensors_hold_the_same_bytes(golden: Path) -> None:
    with (
        open_source(golden / "tiny-fp/bin-2shards") as shards,
        open_source(golden / "tiny-fp/safetensors-fp16") as single,
    ):
        assert [path.name for path in shards.files] == list(SHARDS)
        assert shards.config["n_embd"] == single.config["n_embd"] == 64
        masks = {name for name in shards.tensors if name.endswith(".attn.causal_mask")}
        assert len(masks) == 3
        assert shards.tensors.keys() - masks == single.tensors.keys()
        for name, found in single.tensors.items():
            other = shards.tensors[name]
            assert (found.dtype, found.shape, found.nbytes) == (other.dtype, other.shape, other.nbytes)
            assert found.dtype == "float16"
            assert single.read(name).tobytes() == shards.read(name).tobytes()
        for name in masks:
            assert shards.tensors[name].dtype == "bool"
            assert np.array_equal(shards.read(name)[0, 0], np.tri(128, dtype=bool))


def test_bfloat16_comes_as_its_bits(golden: Path) -> None:
    with (
        open_source(golden / "tiny-fp/safetensors-bf16") as rounded,
        open_source(golden / "tiny-fp/safetensors-fp16") as exact,
    ):
        name = "transformer.h.1.mlp.fc_in.weight"
        assert rounded.tensors[name].dtype == "bfloat16"
        bits = rounded.read(name)
        assert bits.dtype == np.uint16
        values = (bits.astype(np.uint32) << 16).view(np.float32)
        assert np.allclose(values, exact.read(name).astype(np.float32), rtol=2**-8, atol=0)


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantised_checkpoints_are_tensors_like_others(golden: Path, name: str) -> None:
    listed = json.loads((golden / name / "tensors.json").read_text())
    with open_source(golden / name) as source:
        assert {key: [list(found.shape), found.dtype] for key, found in source.tensors.items()} == listed
        for key, found in source.tensors.items():
            array = source.read(key)
            assert (array.shape, array.nbytes, array.dtype.name) == (found.shape, found.nbytes, found.dtype)


def test_pieces_make_the_whole(golden: Path) -> None:
    with open_source(golden / "tiny-fp-h8/bin-single") as source:
        name = "transformer.wte.weight"
        whole = source.read(name).tobytes()
        pieces = []
        for start in range(0, len(whole), 4097):
            out = np.empty(min(4097, len(whole) - start), np.uint8)
            source.read_into(name, start, out)
            pieces.append(out.tobytes())
        assert b"".join(pieces) == whole
        rows = np.empty((3, source.tensors[name].shape[1]), np.float16)
        source.read_into(name, 2 * rows[0].nbytes, rows)
        assert np.array_equal(rows, source.read(name)[2:5])
        assert bytes(source.read_bytes(name, len(whole), 0)) == b""


def test_pieces_outside_the_tensor_are_refused(golden: Path) -> None:
    with open_source(golden / "tiny-fp/safetensors-fp16") as source:
        with pytest.raises(
            ShapeError, match=r"lm_head.bias has 640 bytes; a contiguous array for 2 of them from byte 639"
        ):
            source.read_into("lm_head.bias", 639, np.empty(2, np.uint8))
        with pytest.raises(ShapeError, match="Ask for a piece inside the tensor"):
            source.read_into("lm_head.bias", -1, np.empty(2, np.uint8))
        with pytest.raises(ShapeError, match="a contiguous array"):
            source.read_into("lm_head.bias", 0, np.empty((4, 4), np.uint8)[:, ::2])
        with pytest.raises(ShapeError, match="has 640 bytes"):
            source.read_bytes("lm_head.bias", 0, 1 << 60)
        with pytest.raises(CheckpointError, match=r"holds no tensor lm_head\.bios"):
            source.read("lm_head.bios")


def test_shards_without_an_index(golden: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(golden / "tiny-fp/bin-2shards", folder)
    (folder / "pytorch_model.bin.index.json").unlink()
    (folder / "training_args.bin").write_bytes(b"not weights")
    with open_source(folder) as source, open_source(golden / "tiny-fp/bin-2shards") as indexed:
        assert source.tensors.keys() == indexed.tensors.keys()
    (folder / SHARDS[0]).unlink()
    with pytest.raises(CheckpointError, match=rf"{SHARDS[0]}: promised by the numbering of the others, but missing"):
        open_source(folder)


def test_files_of_any_name(tmp_path: Path) -> None:
    shard(tmp_path, "part-a.bin", "a")
    shard(tmp_path, "part-b.bin", "b")
    with open_source(tmp_path) as source:
        assert list(source.tensors) == ["a", "b"]


def test_sharded_safetensors(golden: Path, tmp_path: Path) -> None:
    for part in ("fp16", "bf16"):  # the second is not in the index
        shutil.copy(golden / f"tiny-fp/safetensors-{part}/model.safetensors", tmp_path / f"{part}.safetensors")
    (tmp_path / "config.json").write_text("{}")
    names = open_source(golden / "tiny-fp/safetensors-fp16").tensors
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "fp16.safetensors")})
    )
    with open_source(tmp_path) as source:
        assert [path.name for path in source.files] == ["fp16.safetensors"]
        assert source.tensors.keys() == names.keys()


def test_a_single_safetensors_file_comes_before_everything_else(golden: Path, tmp_path: Path) -> None:
    shard(tmp_path, "pytorch_model.bin", "other")
    shutil.copy(golden / "tiny-fp/safetensors-fp16/model.safetensors", tmp_path)
    with open_source(tmp_path) as source:
        assert "other" not in source.tensors


def test_the_kind_of_a_file_is_told_by_its_bytes(golden: Path, tmp_path: Path) -> None:
    shutil.copy(golden / "tiny-fp/safetensors-fp16/model.safetensors", tmp_path / "pytorch_model.bin")
    shard(tmp_path / "zip", "model.safetensors", "a")
    with open_source(tmp_path / "pytorch_model.bin") as source:
        assert len(source.tensors) == 29
        assert source.config == {}
    with open_source(tmp_path / "zip") as source:
        assert list(source.tensors) == ["a"]


def test_one_shard_alone(golden: Path) -> None:
    with open_source(golden / "tiny-fp/bin-2shards" / SHARDS[1]) as source:
        assert source.config["n_layer"] == 3
        assert "lm_head.weight" in source.tensors
        assert "transformer.wte.weight" not in source.tensors


def test_partial_passes_over_shards_that_are_not_there_yet(golden: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(golden / "tiny-fp/bin-2shards", folder)
    (folder / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"{SHARDS[1]}: promised by pytorch_model.bin.index.json, but missing"):
        open_source(folder)
    with open_source(folder, partial=True) as source:
        assert source.missing_files == [folder / SHARDS[1]]
        assert [path.name for path in source.files] == [SHARDS[0]]
        assert "transformer.wte.weight" in source.tensors


def test_links_as_in_the_hugging_face_cache(golden: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    blobs = tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((golden / "tiny-fp/bin-2shards").iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    with open_source(snapshot) as source:
        assert len(source.tensors) == 32


def open_files() -> list[str]:
    """What this process has open."""
    return [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]


def test_a_released_file_frees_its_disk_space(tmp_path: Path) -> None:
    shard(tmp_path, "part-a.bin", "a")
    shard(tmp_path, "part-b.bin", "b")
    with open_source(tmp_path) as source:
        first = source.files[0]
        first.unlink()
        assert source.read("a").nbytes == 8
        assert f"{first} (deleted)" in open_files()
        source.release(first)
        assert f"{first} (deleted)" not in open_files()
        with pytest.raises(DiskError, match=r"part-a\.bin is closed already"):
            source.read("a")
        assert source.read("b").nbytes == 8


def test_no_file_is_left_open_after_a_refusal(tmp_path: Path) -> None:
    shard(tmp_path, "part-a.bin", "a")
    (tmp_path / "part-b.bin").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"part-b\.bin is neither a torch nor a safetensors file"):
        open_source(tmp_path)
    assert not [name for name in open_files() if name.startswith(str(tmp_path))]


def test_a_file_that_shrinks_while_it_is_read(golden: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    shutil.copy(golden / "tiny-fp/safetensors-fp16/model.safetensors", path)
    with open_source(path) as source:
        os.truncate(path, 5000)
        with pytest.raises(CheckpointError, match=r"40960 bytes were wanted at byte \d+, the file ends at 5000"):
            source.read("transformer.wte.weight")


def test_config_json_is_needed_in_a_folder(golden: Path, tmp_path: Path) -> None:
    shutil.copy(golden / "tiny-fp/safetensors-fp16/model.safetensors", tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        open_source(tmp_path)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere is missing\. Is the path right"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="embedded null"):
        open_source(tmp_path / "a\0b")


READER = """
import resource, sys
from pathlib import Path
import numpy as np
from moss_jt.converters.source import open_source

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = np.empty(8 << 20, np.uint8)
with open_source(Path(sys.argv[1])) as source:
    for name, found in source.tensors.items():
        for start in range(0, found.nbytes, out.nbytes):
            source.read_into(name, start, out[: min(out.nbytes, found.nbytes - start)])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("megabytes", [64, 256])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, megabytes: int) -> None:
    count = megabytes << 19
    description = pickled({f"t{i}": tensor((count // 4,), count=count // 4, key=str(i)) for i in range(4)})
    (tmp_path / "a.bin").write_bytes(zip_file(description, {str(i): bytes(count // 2) for i in range(4)}))
    run = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "a.bin")], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 24 << 10  # KiB: the buffer of 8 MiB and some


def test_heavy_modules_are_not_loaded() -> None:
    code = "import sys, moss_jt.converters.source; print({'jittor', 'torch', 'cupy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
