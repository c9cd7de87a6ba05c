"""A model in floating point to a native folder in int4 or int8, or the head of a quantised one to int8."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moss_jt.checked_file import printable
from moss_jt.checkpoint import CONFIG_FILE, is_native
from moss_jt.config import Bits, FloatType, MossConfig, Quantization
from moss_jt.converters.conversion import Conversion, Task, convert
from moss_jt.converters.native_plan import QUANTIZE, HeadType, Options
from moss_jt.converters.rounding import Quantizer, RoundToNearest
from moss_jt.converters.shelf import Arrive
from moss_jt.converters.verify import read_manifest
from moss_jt.progress import Progress

GROUP_SIZE = 128


@dataclass(frozen=True)
class MatrixError:
    """How far a quantised matrix is from the one that it was made from.

    Attributes:
        relative: root of the mean square of the errors, over that of the weights.
        plain: what it would be with codes spread evenly from the least to the greatest weight of each group.
    """

    relative: float
    plain: float


@dataclass(frozen=True)
class Quantized:
    """What was made.

    Attributes:
        conversion: the folder, its config, its size.
        errors: of the matrices that were quantised for it, by name; those that came quantised are not here.
    """

    conversion: Conversion
    errors: Mapping[str, MatrixError]


def quantize(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    bits: Bits | None = None,
    group_size: int = GROUP_SIZE,
    head: HeadType | None = None,
    dtype: FloatType | None = None,
    quantizer: Quantizer | None = None,
    resume: bool = False,
    name: str | None = None,
    arrive: Arrive | None = None,
    progress: Progress | None = None,
) -> Quantized:
    """Quantise a model.

    Works in bounded memory, whatever the model's size: some rows of a matrix at a time in each thread.

    Args:
        src: a Hugging Face folder (or one file of weights) or a native folder, in floating point. A native
            folder that is quantised already keeps its matrices byte for byte; only its head can be changed.
        dst: native folder to make.
        bits: of the four matrices of each block; may be None where they are quantised already.
        group_size: inputs that share a scale and a zero point; -1 for all of a row.
        head: "int8" quantises lm_head too, in groups of 128; None keeps it.
        dtype: of what stays in floating point; None keeps the source's.
        quantizer: chooses the codes; None takes `RoundToNearest`.
        resume: go on with an interrupted run, to the same bytes.
        name: of the model, kept in its config; None takes the source's, with the bits added.
        arrive: brings a weight file that the source's index names and that is not there yet.
        progress: told the bytes written.

    Raises:
        ConfigError: the destination is taken, the options are not those of the interrupted run, or there is
            nothing to quantise.
        CheckpointError: the source is broken, not a MOSS checkpoint, or its weights are too large.
        DiskError: not enough room, or the disk fails; the run can be resumed.
    """
    source, target = (Path(os.path.abspath(path)) for path in (src, dst))  # noqa: PTH100 (links are kept)
    native = is_native(source)
    chosen = quantizer or RoundToNearest()
    quantization = Quantization(bits, group_size) if bits is not None else None
    options = Options(dtype, name or _name(source, bits, native=native), head, quantization, chosen.label)
    task = Task(QUANTIZE, source, target, options, native, f"Quantising to {target.name}")
    done = convert(task, quantizer=chosen, resume=resume, arrive=arrive, progress=progress)
    return Quantized(done, read_errors(target))


def read_errors(path: Path) -> dict[str, MatrixError]:
    """What the manifest of a native folder says of its quantised matrices; those of a conversion are not known.

    Raises:
        CheckpointError: the manifest is missing or broken.
    """
    return {
        name: MatrixError(float(told["relative_error"]), float(told["relative_error_plain"]))
        for name, told in read_manifest(path)["tensors"].items()
        if "relative_error" in told and "relative_error_plain" in told
    }


def _name(source: Path, bits: Bits | None, *, native: bool) -> str:
    """The name of the result, if nobody says."""
    if not native:
        return f"{printable(source.name)}-int{bits}"
    config = MossConfig.from_file(source / CONFIG_FILE)
    base = config.name or printable(source.name)
    return base if config.quantization is not None else f"{base}-int{bits}"
