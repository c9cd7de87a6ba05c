"""The conversations in the folder named by MOSS_SFT_DATA, turn by turn, as their fields."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

needs_data = pytest.mark.skipif(
    "MOSS_SFT_DATA" not in os.environ, reason="MOSS_SFT_DATA names no folder of real conversations"
)
KEYS = ("Human", "Inner Thoughts", "Commands", "Tool Responses", "MOSS")
ORDER = ("Search", "Calculate", "Solve")
_BLOCK = re.compile(r"^(?=[A-Za-z]\w*\(.*\) ?=>)", re.MULTILINE)


@dataclass(frozen=True)
class RealTurn:
    """One turn: where it is, and its fields without tags and end markers."""

    place: str
    meta: str
    human: str
    thoughts: str
    commands: str
    results: str  # with the white space around it, which tells the two forms apart
    moss: str
    text: str  # the whole turn

    @property
    def blocks(self) -> list[tuple[str, str]]:
        """(call, what came of it) for each call that the Results record."""
        parts = [part for part in _BLOCK.split(self.results.strip("\n")) if "=>" in part]
        return [(head.rstrip(), body.strip("\n")) for head, _, body in (part.partition("=>") for part in parts)]


def real_turns() -> Iterator[RealTurn]:
    """Every turn of every file."""
    for path in sorted(Path(os.environ["MOSS_SFT_DATA"]).rglob("*.json*")):
        for number, record in enumerate(_records(path), 1):
            for name, fields in record["chat"].items():
                human, thoughts, commands, results, moss = (fields[key].split("|>:", 1)[1][:-6] for key in KEYS)
                text = "".join(fields[key] for key in KEYS)
                place = f"{path.name}:{number}:{name}"
                meta = record["meta_instruction"]
                yield RealTurn(place, meta, human, thoughts, commands, results, moss, text)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The conversations of a file: one a line, or one in all, or a list."""
    text = path.read_text("utf-8")
    if path.suffix == ".jsonl":
        yield from map(json.loads, filter(str.strip, text.splitlines()))
        return
    whole = json.loads(text)
    yield from (
        one for one in (whole if isinstance(whole, list) else [whole]) if isinstance(one, dict) and "chat" in one
    )


def literal(text: str, *, cut: bool = True) -> str | None:
    """The text that a Python literal means; with `cut`, also of one whose end was cut off, what is left of it."""
    for attempt in (text, text + text[:1]) if cut else (text,):
        try:
            value = ast.literal_eval(attempt)
        except (SyntaxError, ValueError):
            continue
        return value if isinstance(value, str) else None
    return None
