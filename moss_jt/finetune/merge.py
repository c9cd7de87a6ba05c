"""An adapter and its model to one model without: W + scale * B A, in floating point."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt.adapter import load_adapter
from moss_jt.checkpoint import Checkpoint
from moss_jt.config import FloatType
from moss_jt.errors import ConfigError
from moss_jt.finetune.export import Export, export_model, is_taken
from moss_jt.finetune.start import read_floats, without_codes
from moss_jt.progress import Progress

Floats = npt.NDArray[np.float32]


def merge_adapter(
    model: Path,
    adapter: str | os.PathLike[str],
    dst: Path,
    *,
    dtype: FloatType | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a native folder of a model with an adapter's terms added to its weights; one layer is in memory at a time.

    A quantised model becomes one in floating point; `moss-jt quantize` rounds it again.

    Args:
        model: native folder that the adapter was trained on.
        adapter: its folder.
        dst: folder to write; nothing, or an empty folder, is there now.
        dtype: of the written weights; None for the model's.
        progress: told the bytes written.

    Raises:
        CheckpointError: the model or the adapter is broken, or they do not belong together.
        ConfigError: the destination is taken.
        DiskError: the disk is full or fails.
    """
    dst = Path(os.path.abspath(dst))  # noqa: PTH100 (links are kept: the folder's own name matters)
    if is_taken(dst):
        raise ConfigError(f"{dst} exists already. Choose another name or delete it.")
    checkpoint = Checkpoint.open(model)
    found = load_adapter(adapter, checkpoint.config)
    pairs: dict[str, Any] = {name: (a, b) for name, a, b in found.pairs()}

    def tensor(name: str) -> Floats:
        values = read_floats(checkpoint, name)
        if name in pairs:
            a, b = pairs[name]
            values += np.float32(found.shape.scale) * (b @ a)
        return values

    config = without_codes(checkpoint.config)
    template = found.template or config.template
    export = Export(config, tensor, checkpoint.path, dtype or config.dtype or "float16", template, dst.name)
    return export_model(dst, export, progress)
