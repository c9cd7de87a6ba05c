"""What is thought before the calculator or the solver is called.

A thought says what is to be done with the numbers of the question, in the order in which the question has them. It is
one piece, so a small model decides that once, where it has read the whole question and nothing else is to be done; what
remains is to copy.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

from moss_tiny.wordings import LANGUAGES, Language, read_blocks, texts

FILE = "thoughts.txt"
_PLACE = re.compile(r"\{[a-z]\}")
_ORDINALS = {"en": ("the first number", "the second", "the third"), "zh": ("第一个数", "第二个数", "第三个数")}


def thought(kind: str, question: str, language: Language) -> str:
    """The thought for a question of a kind.

    Args:
        kind: a block of text/thoughts.txt.
        question: with {a}, {b}, … where its numbers will stand.
        language: of the thought.
    """
    (pattern,) = texts(read_blocks(FILE)[kind], "think", language)
    return _with_ordinals(pattern, sorted(set(_PLACE.findall(pattern)), key=question.index), language)


def thoughts() -> list[str]:
    """Every thought that there is."""
    return [
        _with_ordinals(pattern, order, language)
        for block in read_blocks(FILE).values()
        for language in LANGUAGES
        for pattern in texts(block, "think", language)
        for order in itertools.permutations(sorted(set(_PLACE.findall(pattern))))
    ]


def _with_ordinals(pattern: str, order: Iterable[str], language: Language) -> str:
    for place, ordinal in zip(order, _ORDINALS[language], strict=False):
        pattern = pattern.replace(place, ordinal)
    return pattern
