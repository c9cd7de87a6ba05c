"""The sources of the CUDA kernels: each `<name>.cu` of this folder behind `cuda.h`, as one text that includes nothing."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

SOURCES = (
    *("attention", "attention_rounded", "linear_exact", "linear_rounded", "linear_transposed"),
    *("pointwise", "rounding", "shortlist"),
)
OPTIONS = ("--std=c++17",)  # of the compiler
_ENTRY = re.compile(r"^\s*MOSS_(?:WIDE_)?KERNEL\((\w+)\)", re.MULTILINE)
_EACH = re.compile(r"^MOSS_\w+\((\w+), ", re.MULTILINE)  # kernels that a macro of the source spells out


@cache
def source(name: str) -> str:
    """What is compiled for `<name>.cu`."""
    room = resources.files("moss_jt.kernels")
    return room.joinpath("cuda.h").read_text("utf-8") + room.joinpath(f"{name}.cu").read_text("utf-8")


@cache
def entry_points(name: str) -> tuple[str, ...]:
    """The kernels that `<name>.cu` defines."""
    text = resources.files("moss_jt.kernels").joinpath(f"{name}.cu").read_text("utf-8")
    spelled = [entry for entry in _ENTRY.findall(text) if entry != "name"]
    return (*spelled, *_EACH.findall(text))
