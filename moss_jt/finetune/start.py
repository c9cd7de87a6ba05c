"""Where training starts: from the weights of a folder, or from a shape with random weights."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moss_jt.checked_file import CheckedFile
from moss_jt.checkpoint import MANIFEST_FILE, Checkpoint, expected_shapes, floats_from_bytes
from moss_jt.config import FloatType, MossConfig
from moss_jt.errors import ConfigError
from moss_jt.finetune.export import Export, export_model
from moss_jt.finetune.parameters import Parameters
from moss_jt.layout import PlainLayout, TileLayout
from moss_jt.memory import memory_for
from moss_jt.model import Moss
from moss_jt.ops_grad import LossOps
from moss_jt.packing import dequantize, unpack
from moss_jt.progress import Progress

Floats = npt.NDArray[np.float32]


class Student(Protocol):
    """What is trained, and how its result is written."""

    @property
    def config(self) -> MossConfig:
        """The model's shape."""
        ...

    @property
    def parameters(self) -> Parameters:
        """What is trained of it."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on: what it began from, and the shape of what is trained."""
        ...

    def network(self) -> Moss[Any]:
        """The network to train."""
        ...

    def make_ops(self, variables: Mapping[str, Any]) -> LossOps:
        """The steps over Vars of the parameters."""
        ...

    def write(self, folder: Path, *, tokenizer: Path, dtype: FloatType, name: str, progress: Progress) -> None:
        """Write the result."""
        ...


@dataclass(frozen=True)
class Whole:
    """A model of which everything is trained.

    Attributes:
        config: its shape.
        parameters: its values.
        recompute: see TrainSettings.
        origin: a hash of what it began from.
    """

    config: MossConfig
    parameters: Parameters
    recompute: bool = False
    origin: str = ""

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return {"model": self.origin}

    def network(self) -> Moss[Any]:
        """The network to train."""
        return Moss(self.config)

    def make_ops(self, variables: Mapping[str, Any]) -> LossOps:
        """The steps over Vars of the parameters."""
        return LossOps(self.config, variables, recompute=self.recompute)

    def write(self, folder: Path, *, tokenizer: Path, dtype: FloatType, name: str, progress: Progress) -> None:
        """Write the model as a native folder, for the five-field prompts of the training data."""
        template = self.config.template or "fields"
        export = Export(self.config, self.parameters.array, tokenizer, dtype, template, self.config.name or name)
        export_model(folder, export, progress)


def from_folder(checkpoint: Checkpoint, *, recompute: bool = False) -> Whole:
    """Read all weights of a native folder as float32.

    Raises:
        ConfigError: the weights are quantised.
        CheckpointError: a file is broken.
        DeviceMemoryError: they do not fit into memory.
    """
    config = checkpoint.config
    if config.quantization is not None or config.head_quantization is not None:
        raise ConfigError(
            f"{checkpoint.path} is quantised, and codes cannot be trained. Train an adapter with --lora_rank, or give "
            "the model in floating point."
        )
    with memory_for("the weights"):
        parameters = Parameters(expected_shapes(config))
    for name in parameters.slots:
        parameters.array(name)[...] = read_floats(checkpoint, name)
    return Whole(config, parameters, recompute, hash_of(checkpoint))


def hash_of(checkpoint: Checkpoint) -> str:
    """A hash that tells a model from others: of its manifest, or of its config and sizes where it has none.

    Raises:
        CheckpointError: the manifest cannot be read.
    """
    manifest = checkpoint.path / MANIFEST_FILE
    if manifest.is_file():
        with CheckedFile(manifest) as file:
            return hashlib.sha256(file.read(0, file.size)).hexdigest()[:16]
    sizes = {name: entry.nbytes for name, entry in checkpoint.entries.items()}
    return _hash_of_config(checkpoint.config, sizes)


def _hash_of_config(config: MossConfig, sizes: Mapping[str, int] | None = None) -> str:
    told = json.dumps([config.to_dict(), sizes], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def read_floats(checkpoint: Checkpoint, name: str) -> Floats:
    """A tensor in floating point, float32; codes become the numbers that they stand for."""
    layout = checkpoint.entries[name].layout
    if isinstance(layout, PlainLayout):
        return checkpoint.read_plain(name)
    if isinstance(layout, TileLayout):
        return dequantize(unpack(checkpoint.read(name), layout))
    rows, _ = layout.shape
    return floats_from_bytes(checkpoint.read(name, nbytes=rows * layout.row_bytes), layout.dtype).reshape(layout.shape)


def without_codes(config: MossConfig) -> MossConfig:
    """The shape of the same model in floating point."""
    return replace(config, quantization=None, head_quantization=None)


def from_nothing(config: MossConfig, *, seed: int, recompute: bool = False) -> Whole:
    """Random weights: every matrix normal with the config's initializer_range, as the original's code begins.

    Each tensor depends on its name and the seed alone.
    """
    with memory_for("the weights"):
        parameters = Parameters(expected_shapes(config))
    for name, slot in parameters.slots.items():
        array, shape = parameters.array(name), slot.shape
        if len(shape) == 1:
            array[...] = 1.0 if name.endswith(".weight") else 0.0
            continue
        rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
        array[...] = rng.standard_normal(shape, np.float32) * np.float32(config.initializer_range)
    return Whole(config, parameters, recompute, _hash_of_config(config))


def read_shape(path: Path) -> MossConfig:
    """The shape in a config.json, for a new model.

    Raises:
        ConfigError: the file is missing or broken, names a quantised model, or a spread of weights that cannot be.
    """
    config = MossConfig.from_file(path)
    spread = config.initializer_range
    if not isinstance(spread, int | float) or not 0 < spread < 1:
        raise ConfigError(f"{path}: initializer_range is {spread!r}; it must be a number between 0 and 1, as 0.02.")
    if config.quantization is not None or config.head_quantization is not None:
        raise ConfigError(
            f"{path} is the shape of a quantised model; a new one is trained in floats and quantised later."
        )
    return config
