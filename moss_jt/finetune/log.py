"""Figures of a run: lines of JSON always, TensorBoard's event files where tensorboardX is installed."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moss_jt.errors import ConfigError
from moss_jt.finetune.disk import writing

PACKAGE = "tensorboardX"
_GO_ON = "The checkpoints are kept, and --resume goes on from the newest."


class RunLog:
    """Writes figures into a folder.

    Args:
        folder: made if it is not there.
        begun: steps of a run that goes on: what it holds of them stays, what came after is dropped, for it is done again.
            For 0 the log of another run in this folder is put aside as `log-1.jsonl`, `log-2.jsonl`, ….
        tensorboard: whether to write event files too; None where the package is installed.

    Raises:
        ConfigError: event files are asked for without the package.
        DiskError: the disk is full or fails, here or at any line.
    """

    def __init__(self, folder: Path, *, begun: int = 0, tensorboard: bool | None = None) -> None:
        has_package = find_spec(PACKAGE) is not None
        if tensorboard and not has_package:
            raise ConfigError(f"--tensorboard needs the package {PACKAGE}: pip install tensorboardX")
        self._file = folder / "log.jsonl"
        self._writer: Any = None
        with writing(self._file):
            folder.mkdir(parents=True, exist_ok=True)
            if begun:
                _keep_steps(self._file, begun)
            else:
                _put_aside(self._file)
            self._lines = self._file.open("a", encoding="utf-8")
            if has_package and tensorboard is not False:
                from tensorboardX import SummaryWriter

                self._writer = SummaryWriter(str(folder), flush_secs=10, purge_step=begun + 1 if begun else None)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Note figures of a step."""
        with writing(self._file, _GO_ON):
            self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **figures}) + "\n")
            self._lines.flush()
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        with writing(self._file, _GO_ON):
            self._lines.close()
        if self._writer is not None:
            self._writer.close()


def _put_aside(file: Path) -> None:
    """Give the log of another run another name."""
    if file.exists() and file.stat().st_size:
        names = (file.with_name(f"{file.stem}-{number}{file.suffix}") for number in itertools.count(1))
        file.rename(next(name for name in names if not name.exists()))


def _keep_steps(file: Path, begun: int) -> None:
    """Leave of a log the lines of the first steps; a line that was cut short goes, too."""
    if not file.exists():
        return
    lines = file.read_text("utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= begun]
    if len(kept) < len(lines):
        fresh = file.with_suffix(".new")
        fresh.write_text("".join(kept), "utf-8")
        fresh.replace(file)


def _step_of(line: str) -> float:
    """The step of a line of the log; after all others where a broken disk left something else."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
