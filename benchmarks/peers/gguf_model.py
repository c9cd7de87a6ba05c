"""A GGUF file of random weights with the matrices of MOSS, for llama.cpp.

The architecture is gptneox: like MOSS it adds attention and MLP in parallel and rotates a part of
each head. Its biases are there and zero. Weights repeat every few megabytes; the file holds all of
them, so what a machine reads is what it would read of a trained model.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from moss_jt.config import MossConfig
from moss_jt.layout import round_up

Kind = Literal["q4_0", "q8_0", "q6_k", "f16", "f32"]

ALIGNMENT = 32  # of tensors, the format's default
CHUNK_BYTES = 8 << 20
SPREAD = 0.02  # standard deviation of weights


@dataclass(frozen=True)
class Format:
    """How a kind of numbers is stored: blocks of `numbers` in `nbytes`.

    Attributes:
        code: of the type in a tensor's description.
        file_type: what a file of it says of itself.
        scale_at: byte of a block where its float16 scale lies.
        deviation: standard deviation of a block's random codes times what else multiplies them.
    """

    code: int
    file_type: int
    numbers: int
    nbytes: int
    scale_at: int = 0
    deviation: float = 0.0


FORMATS: dict[Kind, Format] = {
    "f32": Format(0, 0, 1, 4),
    "f16": Format(1, 1, 1, 2),
    "q4_0": Format(2, 2, 32, 18, 0, 4.6),
    "q8_0": Format(8, 7, 32, 34, 0, 74.0),
    "q6_k": Format(14, 18, 256, 210, 208, 18.5 * 74.0),
}


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file: (rows, columns), or a vector where rows is 1."""

    name: str
    rows: int
    columns: int
    kind: Kind
    value: float = 0.0  # of every number of a vector

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        form = FORMATS[self.kind]
        assert self.columns % form.numbers == 0, f"{self.columns} columns are no whole blocks of {self.kind}"
        return self.rows * self.columns // form.numbers * form.nbytes


def tensors_of(config: MossConfig, kind: Kind, head: Kind) -> list[Tensor]:
    """Every tensor of a model of this shape."""
    width, inner, vocabulary = config.n_embd, config.inner_dim, config.vocab_size

    def norm(name: str) -> list[Tensor]:
        return [Tensor(f"{name}.weight", 1, width, "f32", 1.0), Tensor(f"{name}.bias", 1, width, "f32")]

    def linear(name: str, rows: int, columns: int) -> list[Tensor]:
        return [Tensor(f"{name}.weight", rows, columns, kind), Tensor(f"{name}.bias", 1, rows, "f32")]

    found = [Tensor("token_embd.weight", vocabulary, width, kind), *norm("output_norm")]
    found.append(Tensor("output.weight", vocabulary, width, head))
    for layer in range(config.n_layer):
        name = f"blk.{layer}"
        found += norm(f"{name}.attn_norm") + linear(f"{name}.attn_qkv", 3 * width, width)
        found += linear(f"{name}.attn_output", width, width) + norm(f"{name}.ffn_norm")
        found += linear(f"{name}.ffn_up", inner, width) + linear(f"{name}.ffn_down", width, inner)
    return found


def pass_bytes(config: MossConfig, kind: Kind, head: Kind) -> int:
    """Bytes of the matrices that a token is multiplied with."""
    tensors = tensors_of(config, kind, head)
    return sum(tensor.nbytes for tensor in tensors if tensor.rows > 1 and tensor.name != "token_embd.weight")


def write_model(config: MossConfig, target: Path, kind: Kind, head: Kind) -> None:
    """Write the file; it appears when it is whole."""
    tensors = tensors_of(config, kind, head)
    scratch = target.with_suffix(".part")
    random = np.random.default_rng(20230421)
    with scratch.open("wb") as file:
        file.write(header(config, tensors, FORMATS[kind].file_type))
        file.write(bytes(-file.tell() % ALIGNMENT))
        kinds: tuple[Kind, Kind] = (kind, head)
        chunks: dict[Kind, npt.NDArray[np.uint8]] = {
            wanted: chunk_of(wanted, random) for wanted in dict.fromkeys(kinds)
        }
        for tensor in tensors:
            write_tensor(file, tensor, chunks)
            file.write(bytes(-file.tell() % ALIGNMENT))
    scratch.rename(target)


def header(config: MossConfig, tensors: list[Tensor], file_type: int) -> bytes:
    """Everything before the numbers: version 3, metadata, the list of tensors."""
    values: dict[str, str | int | float | bool] = {
        "general.architecture": "gptneox",
        "general.name": f"moss-shape-{config.n_layer}",
        "general.file_type": file_type,
        "general.quantization_version": 2,
        "gptneox.context_length": config.n_positions,
        "gptneox.embedding_length": config.n_embd,
        "gptneox.block_count": config.n_layer,
        "gptneox.feed_forward_length": config.inner_dim,
        "gptneox.rope.dimension_count": config.rotary_dim,
        "gptneox.attention.head_count": config.n_head,
        "gptneox.use_parallel_residual": True,
        "gptneox.attention.layer_norm_epsilon": config.layer_norm_epsilon,
        "gptneox.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "no_vocab",
    }
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(values))]
    parts += [text(key) + value_of(value) for key, value in values.items()]
    offset = 0
    for tensor in tensors:
        shape = (tensor.columns, tensor.rows) if tensor.rows > 1 else (tensor.columns,)
        parts.append(text(tensor.name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
        parts.append(struct.pack("<IQ", FORMATS[tensor.kind].code, offset))
        offset += round_up(tensor.nbytes, ALIGNMENT)
    return b"".join(parts)


def text(value: str) -> bytes:
    """A string of the format."""
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value_of(value: str | int | float | bool) -> bytes:
    """A value of the metadata with its type before it."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<I", 8) + text(value)


def chunk_of(kind: Kind, random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Some megabytes of whole blocks of random numbers."""
    form = FORMATS[kind]
    count = CHUNK_BYTES // form.nbytes
    if form.numbers == 1:
        return (
            (random.standard_normal(count, np.float32) * SPREAD)
            .astype("<f2" if kind == "f16" else "<f4")
            .view(np.uint8)
        )
    blocks = random.integers(0, 256, (count, form.nbytes), np.uint8)
    scale = np.array([SPREAD / form.deviation], "<f2").view(np.uint8)
    blocks[:, form.scale_at : form.scale_at + 2] = scale
    return blocks.reshape(-1)


def write_tensor(file: BinaryIO, tensor: Tensor, chunks: dict[Kind, npt.NDArray[np.uint8]]) -> None:
    """Write the numbers of a tensor."""
    if tensor.rows == 1:
        file.write(np.full(tensor.columns, tensor.value, "<f4").tobytes())
        return
    for piece in pieces(chunks[tensor.kind], tensor.nbytes):
        file.write(piece)


def pieces(chunk: npt.NDArray[np.uint8], nbytes: int) -> Iterator[memoryview]:
    """The chunk, over and over, up to so many bytes."""
    for start in range(0, nbytes, len(chunk)):
        yield chunk.data[: min(len(chunk), nbytes - start)]
