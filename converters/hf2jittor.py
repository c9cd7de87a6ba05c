"""A Hugging Face folder to a native one."""

from __future__ import annotations

import os
from pathlib import Path

from moss_jt.checked_file import printable
from moss_jt.config import FloatType
from moss_jt.converters.conversion import Conversion, Task, convert
from moss_jt.converters.native_plan import CONVERT, HeadType, Options
from moss_jt.converters.rounding import RoundToNearest
from moss_jt.converters.shelf import Arrive
from moss_jt.progress import Progress


def default_destination(src: Path) -> Path:
    """Where the native form of SRC goes if nobody says: SRC-jittor beside it."""
    source = Path(os.path.abspath(src))  # noqa: PTH100 (links are kept: the folder's own name matters)
    return source.parent / f"{source.name if source.is_dir() else source.stem}-jittor"


def hf2jittor(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str] | None = None,
    *,
    dtype: FloatType | None = None,
    head: HeadType | None = None,
    resume: bool = False,
    delete_source: bool = False,
    name: str | None = None,
    arrive: Arrive | None = None,
    way_out: str = "",
    progress: Progress | None = None,
) -> Conversion:
    """Convert a Hugging Face folder to the native format.

    Args:
        src: folder with config.json and weights, or one file of weights with config.json beside it.
        dst: folder to make; `default_destination(src)` if not given.
        dtype: of floating-point weights; None keeps the source's.
        head: type of lm_head's matrix; None treats it as the others. "int8" rounds it, which is the one
            loss that a conversion can have.
        resume: go on with an interrupted conversion, to the same bytes.
        delete_source: delete each weight file of the source as soon as it has been used up.
        name: of the model, kept in its config; None takes the folder's.
        arrive: brings a weight file that the source's index names and that is not there yet; one
            file at least must be there from the start.
        way_out: see Task.
        progress: told the bytes written.

    Raises:
        ConfigError: the destination is taken, or the options are not those of the interrupted run.
        CheckpointError: the source is broken or not a MOSS checkpoint.
        DiskError: not enough room, or the disk fails; the conversion can be resumed.
    """
    source = Path(os.path.abspath(src))  # noqa: PTH100
    target = Path(os.path.abspath(dst if dst is not None else default_destination(source)))  # noqa: PTH100
    quantizer = RoundToNearest()
    options = Options(dtype, name or printable(source.name), head, quantizer=quantizer.label if head == "int8" else "")
    task = Task(CONVERT, source, target, options, native=False, title=f"Converting to {target.name}", way_out=way_out)
    return convert(
        task, quantizer=quantizer, resume=resume, delete_source=delete_source, arrive=arrive, progress=progress
    )
