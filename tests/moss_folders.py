"""Small Hugging Face folders for the tests of the converters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from moss_jt.checkpoint import expected_shapes
from moss_jt.config import Bits, MossConfig, Quantization
from moss_jt.converters.survey import wanted_tensors
from moss_jt.packing import plain_groups

Tensors = dict[str, np.ndarray[Any, Any]]
SHAPE: dict[str, Any] = {
    "model_type": "moss",
    "vocab_size": 96,
    "n_positions": 64,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "rotary_dim": 8,
}


def float_tensors(dtype: str = "float16", seed: int = 0) -> Tensors:
    """Every tensor of a tiny model."""
    rng = np.random.default_rng(seed)
    shapes = expected_shapes(MossConfig.from_dict(SHAPE))
    return {name: (rng.standard_normal(shape) * 0.1).astype(dtype) for name, shape in shapes.items()}


def gptq_tensors(bits: Bits = 4, group_size: int = 32, *, act_order: bool = False, seed: int = 0) -> Tensors:
    """The same in GPTQ form, with random bits."""
    rng = np.random.default_rng(seed)
    config = MossConfig.from_dict({**SHAPE, "wbits": bits, "groupsize": group_size})
    assert config.quantization == Quantization(bits, group_size)
    tensors: Tensors = {}
    for name, shape in wanted_tensors(config).items():
        if name.endswith((".qweight", ".qzeros")):
            tensors[name] = rng.integers(-(2**31), 2**31, shape, dtype=np.int32)
        elif name.endswith(".g_idx"):
            groups = plain_groups(shape[0], shape[0] if group_size == -1 else group_size)
            tensors[name] = rng.permutation(groups) if act_order else groups
        else:
            tensors[name] = (rng.standard_normal(shape) * 0.1).astype(np.float16)
    return tensors


def write_folder(path: Path, tensors: Mapping[str, np.ndarray[Any, Any]], **config: Any) -> Path:
    """A folder with one safetensors file."""
    path.mkdir(parents=True)
    save_file(dict(tensors), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({**SHAPE, **config}))
    return path


def write_shards(path: Path, tensors: Mapping[str, np.ndarray[Any, Any]], shards: int, **config: Any) -> Path:
    """A folder with several safetensors files and their index."""
    path.mkdir(parents=True)
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in mine}, path / file)
        weight_map.update(dict.fromkeys(mine, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps({**SHAPE, **config}))
    return path


def read_folder(path: Path) -> Tensors:
    """All tensors of a folder of safetensors files, by an independent reader."""
    tensors: Tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def files_of(path: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


def names_in(path: Path) -> list[str]:
    """The names in a folder, in order."""
    return sorted(item.name for item in path.iterdir())
