"""From a foreign checkpoint, looked over, to the plan of its native folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moss_jt.checkpoint import CONFIG_FILE, INDEX_FILE, expected_shapes, is_quantized_name
from moss_jt.config import FloatType, MossConfig
from moss_jt.converters.names import gptq_names, source_names
from moss_jt.converters.plan import Plan, dump_json, native_files, native_tensor
from moss_jt.converters.shelf import Shelf
from moss_jt.converters.survey import Survey, survey
from moss_jt.errors import CheckpointError
from moss_jt.layout import Layout, PlainLayout, RowsLayout, TileLayout
from moss_jt.packing import tile_layout

KIND = "hf2jittor"
_NOT_KEPT = ("auto_map", "moss_jt")  # keys of config.json: code that does not come along; our own


@dataclass(frozen=True)
class Options:
    """What changes the bytes of a conversion.

    Attributes:
        dtype: of floating-point weights, None for the source's.
        name: of the model, for its config.
    """

    dtype: FloatType | None
    name: str

    def to_dict(self) -> dict[str, Any]:
        """For the plan."""
        return {"dtype": self.dtype, "name": self.name}


def make_plan(shelf: Shelf, options: Options) -> Plan:
    """Plan the native form of a source.

    Raises:
        ConfigError: its config.json is not that of a MOSS model.
        CheckpointError: it is not a whole MOSS checkpoint.
    """
    if any(name.endswith(".qweight") for name in shelf.names()):
        shelf.fetch(shelf.names())  # act-order is in the numbers: all of them are needed to plan
    found = survey(shelf.source, any_float=options.dtype is not None, promised=len(shelf.names()))
    layouts = {
        name: _layout(shelf, found, name, shape, options) for name, shape in expected_shapes(found.config).items()
    }
    dtypes: set[FloatType] = {layout.dtype for layout in layouts.values() if not isinstance(layout, TileLayout)}
    config = replace(
        found.config,
        name=options.name,
        template="fields" if "plugin" in options.name.lower() else None,
        dtype=dtypes.pop() if len(dtypes) == 1 else None,
    )
    inputs = {
        "options": options.to_dict(),
        "config": dict(found.raw),
        "files": shelf.fingerprints(),
        "needs": {name: _files_of(shelf, name, layout) for name, layout in layouts.items()},
        "dropped": {"count": len(found.dropped), "nbytes": sum(tensor.nbytes for tensor in found.dropped)},
    }
    files = native_files((native_tensor(name, layout) for name, layout in layouts.items()), config.format_version)
    return Plan(KIND, inputs, files, INDEX_FILE, {CONFIG_FILE: dump_json(native_config(config, found.raw))})


def native_config(config: MossConfig, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Our config.json: the original's keys as they are, and ours."""
    values = {key: value for key, value in raw.items() if key not in _NOT_KEPT}
    values.update(config.to_dict())
    if config.dtype is not None:
        values["torch_dtype"] = config.dtype
        if "dtype" in values:  # the same key in newer config files
            values["dtype"] = config.dtype
    if config.quantization is not None:
        values.setdefault("wbits", config.quantization.bits)
        values.setdefault("groupsize", config.quantization.group_size)
    return values


def _layout(shelf: Shelf, found: Survey, name: str, shape: tuple[int, ...], options: Options) -> Layout:
    """How one tensor will be stored."""
    tensors = shelf.source.tensors
    quantization = found.quantization
    if quantization is not None and is_quantized_name(name):
        g_idx = gptq_names(name)["g_idx"]
        try:
            return tile_layout(
                (shape[0], shape[1]), quantization.bits, quantization.group_size, shelf.source.read(g_idx)
            )
        except CheckpointError as error:
            raise CheckpointError(f"{tensors[g_idx].file}: {g_idx}: {error}") from error
    dtype = options.dtype
    if dtype is None:
        known = name if name in tensors else next(iter(n for n in found.wanted if n in tensors), None)
        if known is None:
            raise CheckpointError(f"{shelf.source.path} has none of its weight files yet; one is needed to plan.")
        dtype = _float_type(tensors[known].dtype)
    return RowsLayout((shape[0], shape[1]), dtype) if len(shape) == 2 else PlainLayout(shape, dtype)


def _float_type(dtype: str) -> FloatType:
    """A type that the survey has accepted."""
    types: dict[str, FloatType] = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float32"}
    return types[dtype]


def _files_of(shelf: Shelf, name: str, layout: Layout) -> list[str]:
    """The source files that one tensor is made from."""
    names = source_names(name, quantized=isinstance(layout, TileLayout))
    return sorted({shelf.home_of(source_name) for source_name in names})
