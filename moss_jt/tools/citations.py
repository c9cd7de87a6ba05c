"""The numbers in an answer that point to sources: `<sup><|1|></sup>`, found while the text still arrives."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NUMBER = r"(?:<\|\d{1,3}\|>|\d{1,3}(?!\d))"
_CITATION = re.compile(rf"<sup>\s*({_NUMBER}(?:\s*[,，、;]?\s*{_NUMBER})*)\s*</sup>")
_BEGUN = re.compile(r"<(?:s(?:u(?:p(?:>[\s\d<|>,，、;/sup]{0,60})?)?)?)?$")


@dataclass(frozen=True)
class Citation:
    """Numbers of sources at one place of an answer, and the text that said so."""

    numbers: tuple[int, ...]
    text: str


class CitationStream:
    """Cuts an answer that arrives in pieces into text and citations; holds back only what may be one."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, piece: str) -> list[str | Citation]:
        """Take the next piece; give what is certain."""
        parts, rest = _cut(self._held + piece)
        begun = _BEGUN.search(rest)
        at = begun.start() if begun else len(rest)
        self._held = rest[at:]
        return [*parts, *([rest[:at]] if at else [])]

    def flush(self) -> list[str | Citation]:
        """Give what was held back."""
        held, self._held = self._held, ""
        return [held] if held else []


def _cut(text: str) -> tuple[list[str | Citation], str]:
    """What stands up to the last whole citation, and the rest."""
    parts: list[str | Citation] = []
    end = 0
    for found in _CITATION.finditer(text):
        if found.start() > end:
            parts.append(text[end : found.start()])
        parts.append(Citation(tuple(int(number) for number in re.findall(r"\d+", found[1])), found[0]))
        end = found.end()
    return parts, text[end:]


def citation_at(text: str, at: int) -> Citation | None:
    """The whole citation that begins at a place of a text."""
    found = _CITATION.match(text, at)
    if found is None:
        return None
    return Citation(tuple(int(number) for number in re.findall(r"\d+", found[1])), found[0])


def without_begun(text: str) -> str:
    """A text that still arrives, without a citation of which only the beginning has come."""
    begun = _BEGUN.search(text)
    return text[: begun.start()] if begun else text


def cited(text: str) -> tuple[int, ...]:
    """The numbers that a whole answer cites, each once, in order."""
    found = (int(number) for one in _CITATION.finditer(text) for number in re.findall(r"\d+", one[1]))
    return tuple(dict.fromkeys(found))
