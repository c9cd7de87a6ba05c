"""The files of a checkpoint, planned to the byte before the first one is written.

A plan is plain data and the same for the same input, so an interrupted conversion can go on from
its plan alone. It holds the safetensors files with every tensor's place, and the texts of the other
files; where the numbers come from is told to `moss_jt.converters.output` by whoever made the plan.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from moss_jt.checkpoint import LAYOUTS_KEY
from moss_jt.config import FORMAT_NAME
from moss_jt.layout import ALIGNMENT, Layout, PlainLayout, round_up

SHARD_BYTES = 2 << 30
PLAN_VERSION = 1
CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "int32": "I32"}  # dtype -> safetensors code
CODE_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "I32": 4, "U8": 1}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output.

    Attributes:
        code: dtype as safetensors writes it.
        shape: as in the file; a matrix of ours is a row of bytes there.
        layout: its description for the metadata, None for an ordinary tensor.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    layout: dict[str, Any] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        count = CODE_BYTES[self.code]
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class PlannedFile:
    """One safetensors file: its header and where its tensors start."""

    name: str
    tensors: tuple[PlannedTensor, ...]
    metadata: dict[str, str]
    header: bytes = field(repr=False)
    offsets: dict[str, int] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Plan:
    """Everything that an output folder will hold.

    Attributes:
        kind: what is being done ("hf2jittor"), so that another command does not go on with it.
        inputs: whatever the output depends on: source fingerprint, options. Plain JSON.
        files: the safetensors files.
        index_name: the file that says which tensor lies in which file, None where there is only one.
        texts: further files, name -> contents.
    """

    kind: str
    inputs: dict[str, Any]
    files: tuple[PlannedFile, ...]
    index_name: str | None
    texts: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.nbytes for file in self.files)

    def places(self) -> dict[str, tuple[PlannedFile, PlannedTensor]]:
        """Every tensor by name."""
        return {tensor.name: (file, tensor) for file in self.files for tensor in file.tensors}

    def index_text(self) -> str:
        """The contents of the index."""
        total = sum(tensor.nbytes for file in self.files for tensor in file.tensors)
        weight_map = {tensor.name: file.name for file in self.files for tensor in file.tensors}
        return dump_json({"metadata": {"total_size": total}, "weight_map": weight_map})

    def to_json(self) -> str:
        """The plan as text; `plan_from_json` reads it."""
        files = [
            {
                "name": file.name,
                "metadata": file.metadata,
                "tensors": [[t.name, t.code, list(t.shape), t.layout] for t in file.tensors],
            }
            for file in self.files
        ]
        return dump_json(
            {
                "version": PLAN_VERSION,
                "kind": self.kind,
                "inputs": self.inputs,
                "index_name": self.index_name,
                "texts": self.texts,
                "files": files,
            }
        )

    def digest(self) -> str:
        """SHA-256 of the plan."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def plan_from_json(text: str) -> Plan:
    """Read what `Plan.to_json` wrote; KeyError, TypeError or ValueError where it is something else."""
    values = json.loads(text)
    if values["version"] != PLAN_VERSION:
        raise ValueError(f"version {values['version']}")
    files = tuple(
        plan_file(
            file["name"],
            [PlannedTensor(name, code, tuple(shape), layout) for name, code, shape, layout in file["tensors"]],
            file["metadata"],
        )
        for file in values["files"]
    )
    return Plan(values["kind"], values["inputs"], files, values["index_name"], values["texts"])


def native_tensor(name: str, layout: Layout) -> PlannedTensor:
    """A tensor of the native format."""
    if isinstance(layout, PlainLayout):
        return PlannedTensor(name, CODES[layout.dtype], layout.shape)
    return PlannedTensor(name, "U8", (layout.nbytes,), layout.to_dict())


def native_files(
    tensors: Iterable[PlannedTensor], version: int, shard_bytes: int = SHARD_BYTES
) -> tuple[PlannedFile, ...]:
    """Divide tensors of the native format into files, matrices first and small tensors last in each.

    Args:
        tensors: made by `native_tensor`.
        version: of the format; that of the config.
        shard_bytes: of a file, where tensors allow it.
    """
    shards = _divide(tensors, shard_bytes)
    files = []
    for number, shard in enumerate(shards, 1):
        matrices = [tensor for tensor in shard if tensor.layout is not None]
        small = sorted((t for t in shard if t.layout is None), key=lambda t: -CODE_BYTES[t.code])
        metadata = {
            "format": FORMAT_NAME,
            "version": str(version),
            LAYOUTS_KEY: dump_json({tensor.name: tensor.layout for tensor in matrices}),
        }
        files.append(plan_file(f"model-{number:05d}-of-{len(shards):05d}.safetensors", [*matrices, *small], metadata))
    return tuple(files)


def foreign_files(tensors: Iterable[PlannedTensor], shard_bytes: int = SHARD_BYTES) -> tuple[PlannedFile, ...]:
    """Divide ordinary tensors into files as Hugging Face names them."""
    shards = _divide(tensors, shard_bytes)
    if len(shards) == 1:
        return (plan_file("model.safetensors", shards[0], {"format": "pt"}),)
    return tuple(
        plan_file(f"model-{number:05d}-of-{len(shards):05d}.safetensors", shard, {"format": "pt"})
        for number, shard in enumerate(shards, 1)
    )


def plan_file(name: str, tensors: list[PlannedTensor], metadata: dict[str, str]) -> PlannedFile:
    """Lay tensors one after another and make the header, padded so that the first starts on a page."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    relative: dict[str, int] = {}
    position = 0
    for tensor in tensors:
        relative[tensor.name] = position
        end = position + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.code, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = round_up(8 + len(text), ALIGNMENT) - 8
    header = length.to_bytes(8, "little") + text.ljust(length)
    offsets = {name: len(header) + start for name, start in relative.items()}
    return PlannedFile(name, tuple(tensors), metadata, header, offsets)


def dump_json(values: Any) -> str:
    """JSON as all our files have it: readable, in the order given, the same every time.

    What is no UTF-8 in the name of a file is escaped, and comes back the same.
    """
    text = json.dumps(values, ensure_ascii=False, indent=1) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate becomes \\udcxx, JSON's own escape


def _divide(tensors: Iterable[PlannedTensor], shard_bytes: int) -> list[list[PlannedTensor]]:
    """Cut a sequence of tensors so that each part stays under `shard_bytes` where it can."""
    shards: list[list[PlannedTensor]] = []
    size = 0
    for tensor in tensors:
        if not shards or size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards
