"""What a folder of weights is, told from its headers alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from moss_jt.checkpoint import Checkpoint, is_native
from moss_jt.config import MossConfig
from moss_jt.converters.gptq import count_act_order
from moss_jt.converters.source import open_source
from moss_jt.converters.survey import survey
from moss_jt.errors import CheckpointError, ConfigError
from moss_jt.layout import TileLayout
from moss_jt.tokenizer import load_tokenizer

MARKERS = ("<eoh>", "<eom>", "<eot>", "<eoc>", "<eor>")


@dataclass(frozen=True)
class FileFacts:
    """One file of weights."""

    name: str
    nbytes: int
    tensors: int


@dataclass(frozen=True)
class Inspection:
    """What is known of a checkpoint without reading its numbers.

    Attributes:
        form: "native" or "hugging face".
        parameters: numbers of the model, quantised ones counted as such.
        dtypes: type -> tensors, as stored.
        act_order: matrices whose inputs are permuted.
        shapes: tensor -> logical shape.
        tokenizer: its kind, None where there is none.
        missing_markers: MOSS's control tokens that the tokenizer lacks.
        tokenizer_problem: why it cannot be read, None if it can.
    """

    path: Path
    form: str
    config: MossConfig
    files: tuple[FileFacts, ...]
    parameters: int
    dtypes: dict[str, int]
    act_order: int
    dropped: int
    shapes: dict[str, tuple[int, ...]]
    tokenizer: str | None
    missing_markers: tuple[str, ...]
    tokenizer_problem: str | None

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.nbytes for file in self.files)


def inspect(path: Path) -> Inspection:
    """Look at a folder of either form.

    Raises:
        ConfigError, CheckpointError, DiskError: it is broken; see `Checkpoint.open` and `survey`.
    """
    return _inspect_native(path) if is_native(path) else _inspect_foreign(path)


def _inspect_native(path: Path) -> Inspection:
    checkpoint = Checkpoint.open(path)
    entries = checkpoint.entries.values()
    counts = Counter(entry.file for entry in entries)
    layouts = [entry.layout for entry in entries]
    dtypes = Counter(f"int{one.bits}" if isinstance(one, TileLayout) else one.dtype for one in layouts)
    return Inspection(
        path,
        "native",
        checkpoint.config,
        tuple(FileFacts(file.name, file.stat().st_size, counts[file]) for file in sorted(counts)),
        sum(_count(one.shape) for one in layouts),
        dict(dtypes),
        sum(isinstance(one, TileLayout) and one.permuted for one in layouts),
        0,
        {entry.name: entry.layout.shape for entry in entries},
        *_look_at_tokenizer(path),
    )


def _inspect_foreign(path: Path) -> Inspection:
    with open_source(path) as source:
        found = survey(source, any_float=True)
        counts = Counter(tensor.file for tensor in source.tensors.values())
        kept = [tensor for name, tensor in source.tensors.items() if name in found.wanted]
        folder = path if path.is_dir() else path.parent
        return Inspection(
            path,
            "hugging face",
            found.config,
            tuple(FileFacts(file.name, file.stat().st_size, counts[file]) for file in source.files),
            found.parameters,
            dict(Counter(tensor.dtype for tensor in kept)),
            count_act_order(found.config, source),
            len(found.dropped),
            {tensor.name: tensor.shape for tensor in kept},
            *_look_at_tokenizer(folder),
        )


def _look_at_tokenizer(folder: Path) -> tuple[str | None, tuple[str, ...], str | None]:
    """The kind of tokenizer, the markers that it lacks, and what is wrong with it."""
    kinds = {"vocab.json": "byte-level BPE", "tokenizer.model": "SentencePiece", "tokenizer.json": "tokenizer.json"}
    kind = next((words for name, words in kinds.items() if (folder / name).is_file()), None)
    if kind is None:
        return None, MARKERS, None
    try:
        markers = load_tokenizer(folder).markers
    except (CheckpointError, ConfigError) as error:
        return kind, MARKERS, str(error)
    return kind, tuple(name for name in MARKERS if name not in markers), None


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
