"""From a checkpoint, looked over, to the plan of its native folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy.typing as npt

from moss_jt.checkpoint import CONFIG_FILE, HEAD, INDEX_FILE, expected_shapes, is_quantized_name, quantization_of
from moss_jt.config import FloatType, MossConfig, Quantization, TemplateName
from moss_jt.converters.names import gptq_names, source_names
from moss_jt.converters.plan import Plan, dump_json, native_files, native_tensor
from moss_jt.converters.shelf import Shelf
from moss_jt.converters.survey import Survey, survey, survey_native
from moss_jt.errors import CheckpointError, ConfigError
from moss_jt.layout import Layout, PlainLayout, RowsLayout, TileLayout
from moss_jt.packing import tile_layout

HeadType = Literal["float16", "int8"]

CONVERT = "hf2jittor"  # kinds of plans
QUANTIZE = "quantize"
HEAD_QUANTIZATION = Quantization(8, 128)  # of a head that is asked for in int8
_NOT_KEPT = ("auto_map", "moss_jt")  # keys of config.json: code that does not come along; our own


@dataclass(frozen=True)
class Options:
    """What changes the bytes of a conversion.

    Attributes:
        dtype: of floating-point weights, None for the source's.
        name: of the model, for its config.
        head: type of lm_head's matrix, None for the source's.
        quantization: of the blocks' matrices, None for the source's.
        quantizer: label of the way to quantise, "" where that is not done.
    """

    dtype: FloatType | None
    name: str
    head: HeadType | None = None
    quantization: Quantization | None = None
    quantizer: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For the plan."""
        return asdict(self)


def make_plan(kind: str, shelf: Shelf, options: Options) -> Plan:
    """Plan the native form of a source.

    Raises:
        ConfigError: its config.json is not that of a MOSS model, or what is asked for cannot be made of it.
        CheckpointError: it is not a whole MOSS checkpoint.
    """
    if any(name.endswith(".qweight") for name in shelf.names()):
        shelf.fetch(shelf.names())  # act-order is in the numbers: all of them are needed to plan
    if shelf.native:
        found = survey_native(shelf.source)
    else:
        found = survey(shelf.source, any_float=options.dtype is not None, promised=len(shelf.names()))
    config = _target(kind, shelf, found, options)
    layouts = _layouts(shelf, found, config, options)
    dtypes: set[FloatType] = {layout.dtype for layout in layouts.values() if not isinstance(layout, TileLayout)}
    config = replace(config, dtype=dtypes.pop() if len(dtypes) == 1 else None)
    inputs = {
        "options": options.to_dict(),
        "config": dict(found.raw),
        "files": shelf.fingerprints(),
        "needs": {
            name: sorted({shelf.home_of(part) for part in _made_from(kind, name, layout)})
            for name, layout in layouts.items()
        },
        "dropped": {"count": len(found.dropped), "nbytes": sum(tensor.nbytes for tensor in found.dropped)},
    }
    files = native_files((native_tensor(name, layout) for name, layout in layouts.items()), config.format_version)
    return Plan(kind, inputs, files, INDEX_FILE, {CONFIG_FILE: dump_json(native_config(config, found.raw))})


def made_from(plan: Plan, name: str) -> list[str]:
    """The tensors of the source from which one of ours is made."""
    return _made_from(plan.kind, name, plan.places()[name][1].layout)


def _made_from(kind: str, name: str, layout: Layout | dict[str, Any] | None) -> list[str]:
    """Only a conversion takes GPTQ's tensors, and only for the blocks' matrices."""
    tiles = layout["layout"] == "tile16" if isinstance(layout, dict) else isinstance(layout, TileLayout)
    return source_names(name, gptq=tiles and kind == CONVERT and is_quantized_name(name))


def native_config(config: MossConfig, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Our config.json: the original's keys as they are, and ours."""
    values = {key: value for key, value in raw.items() if key not in _NOT_KEPT}
    values.update(config.to_dict())
    if config.dtype is not None:
        values["torch_dtype"] = config.dtype
        if "dtype" in values:  # the same key in newer config files
            values["dtype"] = config.dtype
    if config.quantization is not None:
        values["wbits"] = config.quantization.bits
        values["groupsize"] = config.quantization.group_size
    return values


def _target(kind: str, shelf: Shelf, found: Survey, options: Options) -> MossConfig:
    """What the result will be, all but the type of its floats."""
    there = found.config
    if kind == QUANTIZE:
        _check_quantizable(shelf, there, options)
    head = there.head_quantization
    if options.head is not None:
        head = _head_quantization(shelf, there, options.head)
    template: TemplateName | None = "fields" if "plugin" in options.name.lower() else None
    return replace(
        there,
        name=options.name,
        template=there.template if shelf.native else template,
        quantization=options.quantization or there.quantization,
        head_quantization=head,
    )


def _check_quantizable(shelf: Shelf, there: MossConfig, options: Options) -> None:
    """See that there is something to quantise, and floating-point numbers to do it from."""
    where, has = shelf.source.path, there.quantization
    if has is None:
        if options.quantization is None:
            raise ConfigError(f"{where} is in floating point: say whether its matrices shall have 4 bits or 8.")
        return
    kept = f"{where} is int{has.bits} in groups of {has.group_size} already, and its matrices can only be kept so"
    if not shelf.native:
        raise ConfigError(f"{kept}. Convert it with moss-convert hf2jittor, which can make its head int8 too.")
    if options.quantization not in (None, has):
        raise ConfigError(f"{kept}. Quantise the floating-point model it was made from.")
    if there.head_quantization is not None:
        raise ConfigError(f"{kept}. Its head is quantised too: nothing is left to be done.")
    if options.head is None:
        raise ConfigError(f"{kept}. Nothing was asked for that could be done: its head can still be made int8.")


def _head_quantization(shelf: Shelf, there: MossConfig, asked: HeadType) -> Quantization | None:
    """How the head will be stored when a type is asked for."""
    has = there.head_quantization
    wanted = HEAD_QUANTIZATION if asked == "int8" else None
    if has is None or has == wanted:
        return wanted
    raise ConfigError(
        f"the head of {shelf.source.path} is int{has.bits} in groups of {has.group_size} already; {asked} would not "
        "bring back what is lost. Start from the floating-point model, or keep it."
    )


def _layouts(shelf: Shelf, found: Survey, config: MossConfig, options: Options) -> dict[str, Layout]:
    """How every tensor will be stored."""
    layouts: dict[str, Layout] = {}
    for name, shape in expected_shapes(config).items():
        quantization = quantization_of(config, name)
        if quantization is None:
            layouts[name] = _float_layout(shelf, found, name, shape, options)
        elif name in shelf.source.layouts:
            layouts[name] = shelf.source.layouts[name]
        else:
            gptq = found.quantization is not None and is_quantized_name(name)
            groups = _read_groups(shelf, name) if gptq else None
            layouts[name] = _tile_layout(shelf, name, (shape[0], shape[1]), quantization, groups)
    return layouts


def _read_groups(shelf: Shelf, name: str) -> npt.NDArray[Any]:
    """The group of each input, of a matrix that comes in GPTQ's form."""
    found: npt.NDArray[Any] = shelf.source.read(gptq_names(name)["g_idx"])
    return found


def _tile_layout(
    shelf: Shelf, name: str, shape: tuple[int, int], quantization: Quantization, groups: npt.NDArray[Any] | None
) -> TileLayout:
    try:
        return tile_layout(shape, quantization.bits, quantization.group_size, groups)
    except CheckpointError as error:
        g_idx = gptq_names(name)["g_idx"]
        raise CheckpointError(f"{shelf.source.tensors[g_idx].file}: {g_idx}: {error}") from error


def _float_layout(shelf: Shelf, found: Survey, name: str, shape: tuple[int, ...], options: Options) -> Layout:
    tensors = shelf.source.tensors
    dtype = "float16" if name == HEAD and options.head == "float16" else options.dtype
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
