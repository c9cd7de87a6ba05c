"""Look a foreign checkpoint over before anything is written: what it is, and all that is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from moss_jt.checkpoint import check_layer_count, expected_shapes, is_quantized_name
from moss_jt.config import MossConfig, Quantization
from moss_jt.converters.floats import FLOAT_BYTES
from moss_jt.converters.gptq import find_quantization, gptq_shapes
from moss_jt.converters.names import gptq_names, is_dropped
from moss_jt.converters.source import Source, SourceTensor
from moss_jt.errors import CheckpointError, ConfigError, MossError

_GPTQ_DTYPES = {"qweight": "int32", "qzeros": "int32", "scales": "float16", "g_idx": "int32"}
_NATIVE_FLOATS = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Survey:
    """What a foreign checkpoint holds.

    Attributes:
        config: its shape; the quantisation is that of the tensors.
        raw: config.json as it is.
        wanted: every tensor that is needed, by its name in the source: the shape.
        dropped: tensors that a model does not need.
    """

    config: MossConfig
    raw: Mapping[str, Any]
    wanted: dict[str, tuple[int, ...]]
    dropped: tuple[SourceTensor, ...]

    @property
    def quantization(self) -> Quantization | None:
        """Bits and group size, None for floating point."""
        return self.config.quantization

    @property
    def parameters(self) -> int:
        """Numbers of the model."""
        return sum(prod(shape) for shape in expected_shapes(self.config).values())


def survey(source: Source, *, any_float: bool, promised: int = 0) -> Survey:
    """See that a source is a whole MOSS checkpoint.

    Args:
        source: opened; its missing files are passed over.
        any_float: also accept float64, because the numbers will be cast.
        promised: tensors that its index names, where files are missing.

    Raises:
        ConfigError: config.json is not that of a MOSS model.
        CheckpointError: tensors are missing, unexpected, misshapen or of a wrong type (all of them
            are named), or bits and groups are not those of the config.
    """
    where = source.path / "config.json"
    if "moss_jt" in source.config:
        raise ConfigError(f"{source.path} is in the native format already; there is nothing to convert.")
    try:
        quantless = {key: value for key, value in source.config.items() if key not in ("wbits", "groupsize")}
        config = MossConfig.from_dict(quantless)
    except (MossError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error
    tensors = source.tensors
    check_layer_count(config, max(promised, len(tensors)))
    try:
        quantization = find_quantization(config, source.config, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{source.path}: {error}") from error
    config = replace(config, quantization=quantization)
    wanted = wanted_tensors(config)
    problems = [] if source.missing_files else [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} is not expected" for name in tensors if name not in wanted and not is_dropped(name)]
    for name, shape in wanted.items():
        if name in tensors:
            problems += problems_of(tensors[name], shape, any_float=any_float)
    if problems:
        raise CheckpointError(
            f"{source.path} does not fit its config.json: {'; '.join(problems)}. Is config.json from another checkpoint?"
        )
    dropped = tuple(tensor for name, tensor in tensors.items() if is_dropped(name))
    return Survey(config, source.config, wanted, dropped)


def wanted_tensors(config: MossConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a foreign checkpoint of this config must hold, and its shape."""
    wanted: dict[str, tuple[int, ...]] = {}
    for name, shape in expected_shapes(config).items():
        if config.quantization is None or not is_quantized_name(name):
            wanted[name] = shape
            continue
        shapes = gptq_shapes(shape, config.quantization)
        wanted.update({source_name: shapes[part] for part, source_name in gptq_names(name).items()})
    return wanted


def problems_of(tensor: SourceTensor, shape: tuple[int, ...], *, any_float: bool) -> list[str]:
    """What is wrong with one tensor, in words."""
    if tensor.shape != shape:
        return [f"{tensor.name} is {tensor.shape}, the config asks for {shape}"]
    part_type = _GPTQ_DTYPES.get(tensor.name.rsplit(".", 1)[-1])
    if part_type is not None:
        return [] if tensor.dtype == part_type else [f"{tensor.name} is {tensor.dtype}, not {part_type}"]
    if tensor.dtype in _NATIVE_FLOATS or (any_float and tensor.dtype in FLOAT_BYTES):
        return []
    if tensor.dtype in FLOAT_BYTES:
        return [f"{tensor.name} is {tensor.dtype}, which needs --dtype"]
    return [f"{tensor.name} is {tensor.dtype}, not a floating-point type"]


def survey_native(source: Source) -> Survey:
    """The same of a native folder, which was seen to be whole when it was opened."""
    config = MossConfig.from_dict(source.config)
    return Survey(config, source.config, expected_shapes(config), ())
