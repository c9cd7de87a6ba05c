"""Wordings: text files of blocks, and patterns that stand for many texts.

A file holds blocks: `[name]`, then lines `key: text; text; …`. In a text `(a|b|)` is one of a, b and nothing.
A key ends in the language, `ask.en`; a key without one is for both. An answer (`say`), a fact, a thought and a command are
one text, whatever it holds. Lines that begin with # are comments. What `sums.txt` begins, `sums-2.txt` may go on with:
more texts for the same blocks.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, Language] = ("en", "zh")
TEXT_FOLDER = Path(__file__).parent.parent / "text"

Block = Mapping[str, tuple[str, ...]]

_CHOICE = re.compile(r"\(([^()]*\|[^()]*)\)")
_WHOLE = ("say", "fact", "command", "back", "think")
_LINE = re.compile(r"([a-z.]+): (.+)")


def expand(pattern: str) -> list[str]:
    """Every text that a pattern stands for, in order; brackets without | are ordinary text."""
    parts = _CHOICE.split(pattern)
    choices = [part.split("|") if number % 2 else [part] for number, part in enumerate(parts)]
    return ["".join(chosen).strip() for chosen in itertools.product(*choices)]


def choose(rng: random.Random, patterns: tuple[str, ...]) -> str:
    """One text of one pattern: each pattern is as likely as another, however many texts it stands for."""
    return rng.choice(expand(rng.choice(patterns)))


@cache
def read_blocks(name: str) -> Mapping[str, Block]:
    """The blocks of a file of the text folder, with what other files add to them.

    Raises:
        ValueError: a line is neither a block's name, nor a key with texts, nor a comment.
    """
    blocks: dict[str, dict[str, tuple[str, ...]]] = {}
    for file in (TEXT_FOLDER / name, *sorted(TEXT_FOLDER.glob(f"{Path(name).stem}-*.txt"))):
        for block, keys in _read_file(file).items():
            whole = blocks.setdefault(block, {})
            for key, found in keys.items():
                whole[key] = whole.get(key, ()) + found
    return blocks


@cache
def read_plain_blocks(name: str) -> Mapping[str, Block]:
    """The blocks of a file of the text folder alone: its texts are in plain words."""
    return _read_file(TEXT_FOLDER / name)


def _read_file(file: Path) -> Mapping[str, Block]:
    """The blocks of one file."""
    blocks: dict[str, dict[str, tuple[str, ...]]] = {}
    current: dict[str, tuple[str, ...]] = {"": ()}
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        text = line.strip()
        found = _LINE.fullmatch(text)
        if text.startswith("[") and text.endswith("]"):
            current = blocks.setdefault(text[1:-1], {})
        elif found and found[1] not in current:
            whole = found[1].split(".")[0] in _WHOLE
            current[found[1]] = (found[2],) if whole else tuple(found[2].split("; "))
        elif text and not text.startswith("#"):
            raise ValueError(f"{file.name}:{number}: {line!r} is no block, no key with texts, or repeats a key.")
    return blocks


def texts(block: Block, key: str, language: Language) -> tuple[str, ...]:
    """The patterns of a block under a key, those of the language or those for both."""
    return block.get(f"{key}.{language}", block.get(key, ()))
