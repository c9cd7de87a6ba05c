"""The form of a bad checkpoint, and the good file from which many bad ones are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fake_torch import pickled, tensor, zip_file

Write = Callable[[Path], None]
DATA = bytes(range(8))  # a storage of four float16
GOOD = {"lm_head.bias": tensor((4,))}
BIG = 1 << 62


@dataclass(frozen=True)
class Hostile:
    """A bad checkpoint: its name, a part of the message that must refuse it, and what writes it into a folder."""

    name: str
    words: str
    write: Write


def put(data: bytes, name: str = "pytorch_model.bin") -> Write:
    """A file with these bytes."""

    def write(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return write


def good_bin() -> bytes:
    """A .bin file with nothing wrong."""
    return zip_file(pickled({"lm_head.bias": tensor((4,))}), {"0": DATA})
