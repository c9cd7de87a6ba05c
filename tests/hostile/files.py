"""Bad checkpoints whose files are what is wrong: zips, safetensors headers, indexes, links, config.json."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

from fake_torch import pickled, tensor, zip_file

from hostile.base import BIG, DATA, GOOD, Hostile, Write, good_bin, put

BIN = "pytorch_model.bin"


def changed(data: bytes, record: bytes, *fields: tuple[int, str, int]) -> bytes:
    """`data` with fields (offset, struct form, value) of its last zip record of this kind changed."""
    result = bytearray(data)
    for offset, form, value in fields:
        struct.pack_into(form, result, result.rfind(record) + offset, value)
    return bytes(result)


def doubled_entry() -> bytes:
    """A zip with the same name twice."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickled({"a": tensor((4,))}))
        archive.writestr("archive/data/0", DATA)
        archive.writestr("archive/data/1", DATA)
    return out.getvalue().replace(b"archive/data/1", b"archive/data/0")


def header(value: Any, data: bytes = DATA) -> Write:
    """A model.safetensors with this header."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return put(struct.pack("<Q", len(text)) + text + data, "model.safetensors")


def entry(dtype: Any = "F16", shape: Any = (4,), offsets: Any = (0, 8)) -> dict[str, Any]:
    """One tensor of a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def index(value: Any, *files: str) -> Write:
    """An index with this weight_map (or these bytes), and good files of these names."""

    def write(folder: Path) -> None:
        data = value if isinstance(value, bytes) else json.dumps({"metadata": {}, "weight_map": value}).encode()
        (folder / "pytorch_model.bin.index.json").write_bytes(data)
        for name in files:
            (folder / name).write_bytes(good_bin())

    return write


def shards(*names: str) -> Write:
    """Good files of these names, each with the same tensor, without an index."""

    def write(folder: Path) -> None:
        for name in names:
            (folder / name).write_bytes(good_bin())

    return write


def link(target: str) -> Write:
    """pytorch_model.bin as a symbolic link."""
    return lambda folder: (folder / "pytorch_model.bin").symlink_to(target)


def config(data: bytes | None) -> Write:
    """A good file of weights beside this config.json."""

    def write(folder: Path) -> None:
        (folder / "pytorch_model.bin").write_bytes(good_bin())
        (folder / "config.json").unlink()
        if data is not None:
            (folder / "config.json").write_bytes(data)

    return write


def config_pipe(folder: Path) -> None:
    """config.json as a pipe that nobody writes to."""
    config(None)(folder)
    os.mkfifo(folder / "config.json")


def sparse_header(folder: Path) -> None:
    """A safetensors file whose header really is as long as it says: 2 GiB of nothing."""
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 2 << 30) + b"{")
        file.truncate((2 << 30) + 8)


SAFETENSORS = [
    Hostile(
        "safetensors-header-of-2-gb",
        "claims a header of 2147483648 bytes",
        put(struct.pack("<Q", 2 << 30) + b"{}", "model.safetensors"),
    ),
    Hostile("safetensors-sparse-header-of-2-gb", "claims a header of 2147483648 bytes", sparse_header),
    Hostile(
        "safetensors-header-past-the-end", "is cut short", put(struct.pack("<Q", 1 << 20) + b"{}", "model.safetensors")
    ),
    Hostile("safetensors-of-3-bytes", "is cut short", put(b"abc", "model.safetensors")),
    Hostile("safetensors-not-utf-8", "is not UTF-8", header(b'{"\xff": 1}')),
    Hostile("safetensors-not-json", "is not valid JSON", header(b"{'a': 1}")),
    Hostile("safetensors-not-an-object", "does not begin with {", header(b"[1, 2]")),
    Hostile("safetensors-too-deep", "nested too deeply", header(b'{"a": ' + b"[" * 200_000)),
    Hostile("safetensors-million-lists", "JSON values", header(b'{"a": [' + b"[]," * 2_000_000 + b"[]]}")),
    Hostile("safetensors-number-of-10000-digits", "is not valid JSON", header(b'{"a": ' + b"9" * 10_000 + b"}")),
    Hostile("safetensors-name-twice", "stands there twice", header(b'{"a": 1, "a": 2}')),
    Hostile("safetensors-overlap", "a and b overlap", header({"a": entry(), "b": entry(shape=(2,), offsets=(4, 8))})),
    Hostile("safetensors-hole", "the header and a leave a hole", header({"a": entry(shape=(2,), offsets=(4, 8))})),
    Hostile("safetensors-past-the-end", "is cut short", header({"a": entry(shape=(400,), offsets=(0, 800))})),
    Hostile("safetensors-bytes-left-over", "4 bytes too many", header({"a": entry(shape=(2,), offsets=(0, 4))})),
    Hostile(
        "safetensors-size-disagrees", "needs 10 bytes, its data_offsets give it 8", header({"a": entry(shape=(5,))})
    ),
    Hostile("safetensors-unknown-dtype", "unknown dtype F12", header({"a": entry("F12")})),
    Hostile("safetensors-dtype-is-a-list", "unknown dtype", header({"a": entry([["F16"]])})),
    Hostile("safetensors-negative-shape", "impossible shape", header({"a": entry(shape=(-2, -2))})),
    Hostile("safetensors-huge-shape", "its data_offsets give it 8", header({"a": entry(shape=(BIG, BIG))})),
    Hostile("safetensors-shape-of-halves", "impossible shape", header({"a": entry(shape=(0.5, 8))})),
    Hostile("safetensors-shape-of-bools", "impossible shape", header({"a": entry(shape=(True, 4))})),
    Hostile("safetensors-offsets-backwards", "impossible data_offsets", header({"a": entry(offsets=(8, 0))})),
    Hostile("safetensors-odd-metadata", "__metadata__ must be an object of texts", header({"__metadata__": {"a": 1}})),
    Hostile("safetensors-entry-is-a-text", "must be described by dtype, shape and data_offsets", header({"a": "F16"})),
    Hostile("safetensors-name-with-line-feed", "unusable name", header({"a\nb": entry()})),
    Hostile(
        "safetensors-is-lfs-pointer",
        "is a Git LFS pointer",
        put(b"version https://git-lfs.github.com/spec/v1\n", "model.safetensors"),
    ),
]

INDEXES = [
    Hostile(
        "index-points-above",
        "must name a file of its own folder",
        index({"lm_head.bias": "../runs-os-system/pytorch_model.bin"}),
    ),
    Hostile("index-points-to-root", "must name a file of its own folder", index({"lm_head.bias": "/etc/passwd"})),
    Hostile("index-points-to-folder-above", "must name a file of its own folder", index({"lm_head.bias": ".."})),
    Hostile("index-with-backslash", "must name a file of its own folder", index({"lm_head.bias": "..\\x.bin"})),
    Hostile("index-of-numbers", "must name a file of its own folder", index({"lm_head.bias": 7})),
    Hostile(
        "index-of-missing-shards",
        "b.bin and 1 more: promised by pytorch_model.bin.index.json, but missing",
        index({"lm_head.bias": "a.bin", "x": "b.bin", "y": "c.bin"}, "a.bin"),
    ),
    Hostile(
        "index-of-missing-tensor",
        "lacks lm_head.weight, which",
        index({"lm_head.bias": "a.bin", "lm_head.weight": "a.bin"}, "a.bin"),
    ),
    Hostile(
        "index-of-wrong-shard",
        "holds lm_head.bias twice",
        index({"lm_head.bias": "a.bin", "x": "b.bin"}, "a.bin", "b.bin"),
    ),
    Hostile("index-not-utf-8", "is not UTF-8", index(b'{"weight_map": {"\xff": "a.bin"}}')),
    Hostile("index-not-json", "is not valid JSON", index(b"weight_map")),
    Hostile("index-too-deep", "nested too deeply", index(b'{"weight_map": ' + b'{"a": ' * 200_000)),
    Hostile("index-is-a-list", "holds a JSON list where an object was expected", index(b"[]")),
    Hostile("index-without-map", "lacks the weight_map", index(b'{"metadata": {}}')),
    Hostile("index-of-10000-files", "speaks of 10000 files", index({str(i): f"{i}.bin" for i in range(10_000)})),
    Hostile("index-of-17-mb", "no JSON of a checkpoint has over", index(b'{"weight_map": {}}' + b" " * (17 << 20))),
    Hostile(
        "shards-with-a-gap",
        "pytorch_model-00002-of-00003.bin: promised by the numbering",
        shards("pytorch_model-00001-of-00003.bin", "pytorch_model-00003-of-00003.bin"),
    ),
    Hostile(
        "shards-of-two-checkpoints",
        "more than one checkpoint",
        shards("pytorch_model-00001-of-00001.bin", "pytorch_model-00001-of-00002.bin"),
    ),
    Hostile("shards-of-a-billion", "speaks of 999999999 files", shards("pytorch_model-000000001-of-999999999.bin")),
    Hostile(
        "shards-with-a-tensor-twice",
        "holds lm_head.bias twice",
        shards("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
    ),
]

FILES = [
    Hostile("file-link-to-itself", "leads back to itself", link(BIN)),
    Hostile("file-link-to-nothing", "is a symbolic link to a file that is missing", link("nowhere")),
    Hostile("file-link-to-folder", "is a folder where a file was expected", link(".")),
    Hostile("file-link-to-device", "is a device where a file was expected", link("/dev/zero")),
    Hostile("file-pipe", "is a pipe where a file was expected", lambda folder: os.mkfifo(folder / BIN)),
    Hostile("file-folder", "is a folder where a file was expected", lambda folder: (folder / BIN).mkdir()),
    Hostile("file-none", "holds no weights", lambda folder: None),
    Hostile("file-only-training-state", "holds no weights", put(good_bin(), "training_args.bin")),
    Hostile("config-missing", "config.json is missing", config(None)),
    Hostile("config-not-utf-8", "is not UTF-8", config(b'{"model_type": "m\xf6ss"}')),
    Hostile("config-is-a-list", "holds a JSON list", config(b"[]")),
    Hostile("config-is-lfs-pointer", "is a Git LFS pointer", config(b"version https://git-lfs.github.com/spec/v1\n")),
    Hostile("config-too-deep", "nested too deeply", config(b'{"a": ' + b"[" * 200_000)),
    Hostile("config-pipe", "is a pipe", config_pipe),
]


ZIPS = [
    Hostile("zip-cut-in-half", "is cut short", put(good_bin()[: len(good_bin()) // 2])),
    Hostile("zip-cut-by-one", "is cut short", put(good_bin()[:-1])),
    Hostile(
        "zip-wrong-magic",
        "is neither a torch nor a safetensors file: it begins with 4d 5a",
        put(b"MZ" + good_bin()[2:]),
    ),
    Hostile(
        "zip-compressed", "is compressed", put(zip_file(pickled(GOOD), {"0": DATA}, compression=zipfile.ZIP_DEFLATED))
    ),
    Hostile("zip-encrypted", "is encrypted", put(changed(good_bin(), b"PK\x01\x02", (8, "<H", 1)))),
    Hostile("zip-overlapping", "lies over another", put(changed(good_bin(), b"PK\x01\x02", (42, "<I", 10)))),
    Hostile("zip-entry-past-the-end", "is cut short", put(changed(good_bin(), b"PK\x01\x02", (42, "<I", 1 << 30)))),
    Hostile(
        "zip-entry-too-long",
        "reaches past the data",
        put(changed(good_bin(), b"PK\x01\x02", (8, "<H", 8), (20, "<I", 9000), (24, "<I", 9000))),
    ),
    Hostile(
        "zip-entry-renamed",
        "has another name in the directory",
        put(good_bin().replace(b"archive/data/0", b"archive/data/1", 1)),
    ),
    Hostile(
        "zip-name-escapes", "unusable name", put(zip_file(pickled(GOOD), {"0": DATA}, more={"archive/../../x": b"x"}))
    ),
    Hostile("zip-name-absolute", "unusable name", put(zip_file(pickled(GOOD), {"0": DATA}, more={"/etc/x": b"x"}))),
    Hostile("zip-entry-twice", "is there twice", put(doubled_entry())),
    Hostile(
        "zip-two-descriptions",
        "2 descriptions of tensors",
        put(zip_file(pickled(GOOD), {"0": DATA}, more={"other/data.pkl": pickled(GOOD)})),
    ),
    Hostile("zip-of-something-else", "0 descriptions of tensors", put(zip_file(b"", {}, root="a/b"))),
    Hostile(
        "zip-big-endian",
        "on a big-endian machine",
        put(zip_file(pickled(GOOD), {"0": DATA}, more={"archive/byteorder": b"big"})),
    ),
    Hostile(
        "zip-checksum-of-the-pickle",
        "checksum of archive/data.pkl is wrong",
        put(good_bin().replace(b"lm_head.bias", b"lm_head.bios")),
    ),
    Hostile(
        "zip-of-65535-entries",
        "its directory ends too early",
        put(changed(good_bin(), b"PK\x05\x06", (8, "<H", 65535), (10, "<H", 65535))),
    ),
    Hostile("zip-directory-of-4-gb", "is impossible", put(changed(good_bin(), b"PK\x05\x06", (12, "<I", 0xFFFFFFF0)))),
    Hostile("zip-directory-far-away", "is impossible", put(changed(good_bin(), b"PK\x05\x06", (16, "<I", 0xFFFFFFF0)))),
    Hostile("zip-split", "one part of a split archive", put(changed(good_bin(), b"PK\x05\x06", (4, "<H", 3)))),
    Hostile(
        "zip64-without-sizes", "lacks its zip64 sizes", put(changed(good_bin(), b"PK\x01\x02", (42, "<I", 0xFFFFFFFF)))
    ),
    Hostile("zip-is-html", "is a web page", put(b"\n<!DOCTYPE html><html><body>Log in</body></html>")),
    Hostile(
        "zip-is-lfs-pointer",
        "is a Git LFS pointer, not the file itself",
        put(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    ),
    Hostile("zip-is-empty", "is empty", put(b"")),
    Hostile("zip-is-json", "is neither a torch nor a safetensors file", put(b'{"weight_map": {}}')),
    Hostile("zip-is-zeros", "is neither a torch nor a safetensors file", put(bytes(4096))),
]
