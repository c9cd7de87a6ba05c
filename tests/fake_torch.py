"""Write torch's file formats without torch, instruction by instruction, so that tests can also write them wrongly."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

MAGIC = 0x1950A86A20F9469CFC6C
ITEM_BYTES = {"HalfStorage": 2, "FloatStorage": 4, "IntStorage": 4, "BoolStorage": 1, "ByteStorage": 1}


class Code(bytes):
    """Instructions that leave one value on the stack."""


_CONSTANTS = {None: Code(b"N"), True: Code(b"\x88"), False: Code(b"\x89")}


def code(value: Any) -> Code:
    """Instructions (protocol 2) for a plain value; a `Code` stands for itself."""
    if isinstance(value, Code):
        return value
    if value is None or isinstance(value, bool):
        return _CONSTANTS[value]
    if isinstance(value, int | str):
        return _scalar(value)
    if isinstance(value, tuple):
        return Code(b"(" + b"".join(map(code, value)) + b"t")
    if isinstance(value, list):
        return Code(b"](" + b"".join(map(code, value)) + b"e")
    assert isinstance(value, dict), type(value)
    return Code(b"}(" + b"".join(code(item) for pair in value.items() for item in pair) + b"u")


def _scalar(value: int | str) -> Code:
    if isinstance(value, int):
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return Code(b"\x8a" + bytes([len(raw)]) + raw)
    raw = value.encode("utf-8", "surrogatepass")
    return Code(b"X" + struct.pack("<I", len(raw)) + raw)


def named(name: str) -> Code:
    """GLOBAL for "module.attribute"."""
    module, _, attribute = name.rpartition(".")
    return Code(f"c{module}\n{attribute}\n".encode())


def call(name: str, *args: Any) -> Code:
    """A call of "module.attribute"."""
    return Code(named(name) + code(args) + b"R")


def storage(kind: str, key: str, count: int) -> Code:
    """A reference to a storage of `count` elements."""
    return Code(code(("storage", named(f"torch.{kind}"), key, "cpu", count)) + b"Q")


def tensor(
    shape: tuple[int, ...],
    *,
    kind: str = "HalfStorage",
    key: str = "0",
    count: int = 4,
    offset: int = 0,
    stride: tuple[int, ...] | None = None,
) -> Code:
    """A tensor on the storage `key`; row-major if no stride is given."""
    if stride is None:
        stride, step = (), 1
        for size in reversed(shape):
            stride, step = (step, *stride), step * size
    hooks = call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", storage(kind, key, count), offset, shape, stride, False, hooks)


def pickled(value: Any) -> bytes:
    """A whole pickle."""
    return b"\x80\x02" + code(value) + b"."


def zip_file(
    description: bytes,
    storages: Mapping[str, bytes],
    *,
    root: str = "archive",
    more: Mapping[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """A file in torch's zip format; `more` are further records under their whole names."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", description)
        for key, data in storages.items():
            archive.writestr(f"{root}/data/{key}", data)
        for name, data in (more or {}).items():
            archive.writestr(name, data)
    return out.getvalue()


def legacy_file(
    description: bytes,
    storages: Mapping[str, bytes],
    *,
    item_bytes: int = 2,
    little_endian: bool = True,
    version: int = 1001,
    magic: int = MAGIC,
) -> bytes:
    """A file in the format before torch 1.6."""
    machine = {
        "protocol_version": version,
        "little_endian": little_endian,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    parts = [pickled(magic), pickled(version), pickled(machine), description, pickled(list(storages))]
    for data in storages.values():
        parts += [struct.pack("<q", len(data) // item_bytes), data]
    return b"".join(parts)
