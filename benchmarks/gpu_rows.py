"""The rows of a part of the GPU suite, told one by one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

FILE = "MOSS_JT_GPU_ROWS"  # the variable with the file that rows are kept in until their part is through


class Rows(dict[str, Any]):
    """What a part has found. Each row goes to stderr as soon as it is there: so a part that is broken off, by a limit of
    time or by a fault of the device that nothing survives, has told what it had; and into a file, for its line."""

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        line = json.dumps({name: value}, ensure_ascii=False, default=str)
        print(line, file=sys.stderr, flush=True)
        if FILE in os.environ:
            with Path(os.environ[FILE]).open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def kept_rows(file: Path) -> dict[str, Any]:
    """The rows that were kept in a file, which need not be there; a last line that was cut off is left out."""
    rows: dict[str, Any] = {}
    if file.is_file():
        for line in file.read_text("utf-8", "replace").splitlines(keepends=True):
            if line.endswith("\n"):
                rows |= json.loads(line)
    return rows
