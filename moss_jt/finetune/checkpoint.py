"""Checkpoints of a run: folders step-00001234 that appear when they are whole.

Each holds weights.safetensors (what is trained, float32), optimizer.safetensors (the moments) and state.json. Since
the order of the data depends on seed and step alone, nothing else is needed to go on to the same numbers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss_jt.errors import CheckpointError, ConfigError
from moss_jt.finetune.disk import writing
from moss_jt.finetune.parameters import Floats, Parameters
from moss_jt.safetensors_file import write_tensors

_NAME = re.compile(r"step-(\d{8})")
_WEIGHTS, _OPTIMIZER, _STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
_MOMENTS = (".first", ".second")


@dataclass(frozen=True)
class State:
    """Where a run stands.

    Attributes:
        step: steps done.
        run: what must be the same for the run to go on: settings, sizes, a hash of the data.
    """

    step: int
    run: Mapping[str, Any]


def save(folder: Path, parameters: Parameters, state: State, *, keep: int) -> Path:
    """Write a checkpoint and remove all but the newest `keep`.

    Raises:
        DiskError: the disk is full or fails; earlier checkpoints are still there.
    """
    target = folder / f"step-{state.step:08d}"
    scratch = folder / f".{target.name}.{os.getpid()}"
    with writing(target, "Earlier checkpoints are kept, and --resume goes on from the newest."):
        try:
            for unfinished in folder.glob(".step-*"):  # of a run that was killed
                shutil.rmtree(unfinished, ignore_errors=True)
            scratch.mkdir(parents=True)
            _write(scratch, parameters, state)
            shutil.rmtree(target, ignore_errors=True)
            scratch.rename(target)
            _force_to_disk(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / _STATE).is_file())


def load(path: Path, parameters: Parameters, run: Mapping[str, Any]) -> State:
    """Take values and moments from a checkpoint.

    Args:
        path: the checkpoint.
        parameters: of the same names and shapes.
        run: of the run that wants to go on.

    Raises:
        ConfigError: it is the checkpoint of a run with other settings.
        CheckpointError: it is broken, or holds other tensors.
    """
    with _reading(path):
        told = json.loads((path / _STATE).read_text("utf-8"))
        state = State(int(told["step"]), dict(told["run"]))
    wanted = json.loads(json.dumps(dict(run)))
    other = sorted(key for key in {*wanted, *state.run} if wanted.get(key) != state.run.get(key))
    if other:
        raise ConfigError(
            f"{path} was made with {other[0]} {state.run.get(other[0])!r}; now it is {wanted.get(other[0])!r}. "
            "Resume with the same data and options, or take another --output_dir."
        )
    _fill(path / _WEIGHTS, parameters, parameters.values, "")
    for flat, suffix in zip(parameters.moments, _MOMENTS, strict=True):
        _fill(path / _OPTIMIZER, parameters, flat, suffix)
    return state


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say of what goes wrong within that a checkpoint cannot be read."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Remove it, and an earlier one is taken.") from error


def _write(folder: Path, parameters: Parameters, state: State) -> None:
    """Write the three files, and wait until they are safe."""
    write_tensors(folder / _WEIGHTS, parameters.arrays())
    moments = {
        f"{name}{suffix}": slot.of(flat)
        for flat, suffix in zip(parameters.moments, _MOMENTS, strict=True)
        for name, slot in parameters.slots.items()
    }
    write_tensors(folder / _OPTIMIZER, moments)
    text = json.dumps({"step": state.step, "run": dict(state.run)}, indent=2, sort_keys=True)
    (folder / _STATE).write_text(text + "\n", "utf-8")
    for file in folder.iterdir():
        _force_to_disk(file)


def _fill(file: Path, parameters: Parameters, flat: Floats, suffix: str) -> None:
    """Take one kind of values from a file, a tensor at a time: all of them at once may not fit beside what is there."""
    from safetensors import safe_open

    path = file.parent
    wanted = {name + suffix for name in parameters.slots}
    with _reading(path), safe_open(file, framework="numpy") as opened:
        held = {name for name in opened.keys() if name.endswith(suffix)}  # noqa: SIM118 - it is no mapping
        if held - wanted:
            raise CheckpointError(
                f"{path} holds {min(held - wanted)}, which is not trained here. Is it of another model?"
            )
        for name, slot in parameters.slots.items():
            array = opened.get_tensor(name + suffix) if name + suffix in held else None
            if array is None or array.shape != slot.shape or array.dtype != np.float32:
                raise CheckpointError(f"{path} has no {name}{suffix} of shape {slot.shape}. Is it of another model?")
            slot.of(flat)[...] = array


def _force_to_disk(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
