"""Checkpoints of random weights in any size, to try a machine before 30 GB are fetched.

The native form is written directly, resumable like a conversion. The Hugging Face form holds the
same weights as a conversion would read them: one pytorch_model.bin.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moss_jt.checkpoint import CONFIG_FILE, INDEX_FILE, expected_shapes, is_quantized_name, quantization_of
from moss_jt.config import MossConfig, Quantization
from moss_jt.converters.byte_tokenizer import BYTES, END_OF_MOSS, marker_ids, tokenizer_files
from moss_jt.converters.conversion import layout_of
from moss_jt.converters.journal import Workplace, disk_error, write_safely
from moss_jt.converters.names import gptq_names
from moss_jt.converters.native_plan import native_config
from moss_jt.converters.output import Pieces, TensorWriter, check_finished, check_room, finish, verify_done
from moss_jt.converters.plan import Plan, PlannedTensor, dump_json, native_files, native_tensor
from moss_jt.converters.random_weights import RandomWeights
from moss_jt.converters.survey import wanted_tensors
from moss_jt.converters.torch_writer import write_torch_file
from moss_jt.errors import ConfigError
from moss_jt.layout import Layout, PlainLayout, RowsLayout, TileLayout
from moss_jt.packing import pack_gptq_pieces, tile_layout
from moss_jt.progress import Progress, Quiet

Preset = Literal["moss-moon-003", "tiny"]
PRESETS: dict[Preset, MossConfig] = {
    "moss-moon-003": MossConfig(n_embd=6144, n_head=24, n_layer=34),
    "tiny": MossConfig(
        vocab_size=272, n_embd=256, n_head=4, n_layer=4, rotary_dim=32, bos_token_id=BYTES, eos_token_id=0
    ),
}
GROUP_SIZE = 128
KIND = "synth"


@dataclass(frozen=True)
class Synthesis:
    """A checkpoint of random weights that was made."""

    path: Path
    config: MossConfig
    nbytes: int


def preset_config(preset: Preset, *, bits: int = 16, layers: int | None = None, head_bits: int = 16) -> MossConfig:
    """The shape of a preset.

    Args:
        preset: a key of PRESETS.
        bits: 4, 8, or 16 for float16.
        layers: other than the preset's.
        head_bits: of lm_head, likewise. The published int4 and int8 checkpoints have a float16 head.

    Raises:
        ConfigError: a value cannot work.
    """
    if preset not in PRESETS:
        raise ConfigError(f"there is no preset {preset!r}; known are {', '.join(PRESETS)}.")
    config = PRESETS[preset]
    assert config.bos_token_id is not None, "presets have special tokens"
    quantization, head = _quantization("bits", bits), _quantization("head_bits", head_bits)
    return replace(
        config,
        n_layer=layers if layers is not None else config.n_layer,
        eos_token_id=marker_ids(config.bos_token_id)[END_OF_MOSS],
        quantization=quantization,
        head_quantization=head,
        dtype="float16",
        name=f"{preset}-random" + (f"-int{bits}" if quantization else "") + (f"-head{head_bits}" if head else ""),
    )


def _quantization(what: str, bits: int) -> Quantization | None:
    """The quantised formats of presets."""
    if bits == 16:
        return None
    if bits not in (4, 8):
        raise ConfigError(f"{what} is {bits}; known are 4, 8, and 16 for float16.")
    return Quantization(4 if bits == 4 else 8, GROUP_SIZE)


def synthesize(
    config: MossConfig,
    dst: str | os.PathLike[str],
    *,
    seed: int = 0,
    resume: bool = False,
    progress: Progress | None = None,
) -> Synthesis:
    """Make a native folder of random weights, with a tokenizer.

    Raises:
        ConfigError: the destination is taken (with `resume`: by something else), or an interrupted run was
            asked for something else.
        DiskError: not enough room, or the disk fails; the run can be resumed.
    """
    target = Path(os.path.abspath(dst))  # noqa: PTH100 (keeps links)
    report = progress or Quiet()
    plan = _native_plan(config, seed)
    with Workplace(target, KIND, resume=resume) as workplace:
        if workplace.whole:
            check_finished(workplace, plan)
            return Synthesis(target, config, plan.nbytes)
        done: dict[str, str] = {}
        if workplace.plan is None:
            check_room(workplace, plan.nbytes)
            workplace.start(plan)
        elif workplace.plan.digest() != plan.digest():
            raise ConfigError(f"{workplace.path} was begun with other options. Give the same ones, or delete it.")
        else:
            done = verify_done(workplace, report)
            check_room(workplace, plan.nbytes)
        _write_native(workplace, plan, RandomWeights(config, seed), done, report)
        finish(workplace, done, manifest=True)
    return Synthesis(target, config, plan.nbytes)


def synthesize_foreign(
    config: MossConfig, dst: str | os.PathLike[str], *, seed: int = 0, progress: Progress | None = None
) -> Synthesis:
    """Make a Hugging Face folder of random weights: one pytorch_model.bin, GPTQ for int4 and int8.

    Not resumable: the folder appears when it is whole.

    Raises:
        ConfigError: the destination is taken, or the head is to be quantised, which that form cannot hold.
        DiskError: not enough room, or the disk fails.
    """
    if config.head_quantization is not None:
        raise ConfigError("the Hugging Face form has no place for a quantised head. Leave it in float16 there.")
    target = Path(os.path.abspath(dst))  # noqa: PTH100
    report = progress or Quiet()
    tensors = [_foreign_tensor(name, shape) for name, shape in wanted_tensors(config).items()]
    nbytes = sum(tensor.nbytes for tensor in tensors)
    texts = {CONFIG_FILE: dump_json(_foreign_config(config)), **_tokenizer_texts(config)}
    with Workplace(target, f"{KIND} --format hf", resume=False) as workplace:
        check_room(workplace, nbytes)
        report.begin(f"Writing {target.name}", nbytes, "B")
        try:
            for name, text in texts.items():
                write_safely(workplace.out / name, text.encode())
            maker = _ForeignMaker(config, RandomWeights(config, seed), report)
            write_torch_file(workplace.out / "pytorch_model.bin", tensors, maker.make)
            workplace.publish()
        except OSError as error:
            raise disk_error(error, target) from error
        finally:
            report.end()
    return Synthesis(target, config, nbytes)


def _native_plan(config: MossConfig, seed: int) -> Plan:
    layouts = {name: _layout(config, name, shape) for name, shape in expected_shapes(config).items()}
    files = native_files((native_tensor(name, layout) for name, layout in layouts.items()), config.format_version)
    texts = {CONFIG_FILE: dump_json(native_config(config, {})), **_tokenizer_texts(config)}
    return Plan(KIND, {"config": config.to_dict(), "seed": seed}, files, INDEX_FILE, texts)


def _layout(config: MossConfig, name: str, shape: tuple[int, ...]) -> Layout:
    if len(shape) == 1:
        return PlainLayout(shape, "float16")
    matrix = (shape[0], shape[1])
    quantization = quantization_of(config, name)
    if quantization is None:
        return RowsLayout(matrix, "float16")
    return tile_layout(matrix, quantization.bits, quantization.group_size)


def _tokenizer_texts(config: MossConfig) -> dict[str, str]:
    assert config.bos_token_id is not None, "presets have special tokens"
    return tokenizer_files(config.bos_token_id, config.n_positions)


def _write_native(
    workplace: Workplace, plan: Plan, weights: RandomWeights, done: dict[str, str], progress: Progress
) -> None:
    places = plan.places()
    pending = [name for name in places if name not in done]
    progress.begin(f"Writing {workplace.dst.name}", sum(places[name][1].nbytes for name in pending), "B")
    try:
        with TensorWriter(workplace, plan, done, progress) as writer:
            for name in pending:
                writer.put(name, _native_pieces(weights, name, layout_of(places[name][1])))
    finally:
        progress.end()


def _native_pieces(weights: RandomWeights, name: str, layout: Layout) -> Pieces:
    if isinstance(layout, TileLayout):
        if is_quantized_name(name):
            yield from pack_gptq_pieces(weights.gptq(name), layout)
        else:
            yield from weights.head_pieces(name, layout)
        return
    written = 0
    for piece in weights.floats(name):
        written += piece.nbytes
        yield piece
    if written < layout.nbytes:
        yield np.zeros(layout.nbytes - written, dtype=np.uint8)


def _foreign_tensor(name: str, shape: tuple[int, ...]) -> PlannedTensor:
    return PlannedTensor(name, "I32" if name.endswith((".qweight", ".qzeros", ".g_idx")) else "F16", shape)


def _foreign_config(config: MossConfig) -> dict[str, Any]:
    values = native_config(config, {})
    del values["moss_jt"]
    return values


class _ForeignMaker:
    """Gives tensors by their foreign names; a quantised matrix is made once for its four."""

    def __init__(self, config: MossConfig, weights: RandomWeights, progress: Progress) -> None:
        self._weights = weights
        self._progress = progress
        self._parts: dict[str, tuple[str, str]] = {}
        if config.quantization is not None:
            for name in filter(is_quantized_name, expected_shapes(config)):
                self._parts.update({full: (name, part) for part, full in gptq_names(name).items()})
        self._held: tuple[str, Any] = ("", None)

    def make(self, name: str) -> Pieces:
        """Yield the numbers of one tensor."""
        if name not in self._parts:
            pieces = self._weights.floats(name)
        else:
            matrix, part = self._parts[name]
            if self._held[0] != matrix:
                self._held = ("", None)
                self._held = (matrix, self._weights.gptq(matrix))
            pieces = iter([getattr(self._held[1], part)])
        for piece in pieces:
            yield piece
            self._progress.advance(piece.nbytes)
