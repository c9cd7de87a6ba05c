"""Search(query): one interface, several back ends; what they find is cleaned and cut as in the training data."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from moss_jt.errors import ToolError
from moss_jt.tools.tool import Hit, Status, Tool

HITS = 3  # of one search; several searches of a turn get fewer each
LONGEST = 390  # characters of a text; with its quotes and escapes it may have 400
MAX_QUERY = 400

_TAGS = re.compile(r"</?[A-Za-z][^<>]{0,300}>|<!--.*?-->", re.DOTALL)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202f\u2060-\u2064\ufeff\ue000\ue001]")
_ENDS = re.compile("[.!?。！？；;]['\"”’)）]?(?=\\s|$)|[。！？；]")


class SearchBackend(Protocol):
    """Something that can be searched."""

    @property
    def name(self) -> str:
        """The word by which it is chosen."""
        ...

    def search(self, query: str, count: int) -> Sequence[Hit]:
        """The `count` best hits, the best first.

        Raises:
            ToolError: it cannot be searched now.
        """
        ...

    def check(self) -> Status:
        """Whether it can be searched."""
        ...


def search_tool(backend: SearchBackend) -> Tool:
    """Search(query) with a back end."""

    def run(*texts: str) -> list[Hit]:
        query = " ".join(" ".join(texts).split())[:MAX_QUERY]
        if not query:
            raise ToolError("the query is empty.")
        return cleaned(backend.search(query, HITS), HITS)

    return Tool("search", "Web search", "Search(query)", run, check=backend.check)


def cleaned(hits: Sequence[Hit], count: int) -> list[Hit]:
    """Hits as they are shown to the model: plain text, cut, none twice, none empty."""
    found: list[Hit] = []
    seen: set[str] = set()
    for hit in hits:
        text = cut(clean(hit.text), LONGEST)
        if text and text not in seen:
            seen.add(text)
            found.append(replace(hit, text=text, title=cut(clean(hit.title).replace("\n", " "), 120)))
    return found[:count]


def clean(text: str) -> str:
    """Text without HTML, control characters and empty lines."""
    text = html.unescape(_TAGS.sub("", text))
    text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " "))
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def cut(text: str, longest: int) -> str:
    """At most `longest` characters, up to the end of a sentence where one lies in the last third."""
    if len(text) <= longest:
        return text
    kept = text[: longest - 4]
    ends = [found.end() for found in _ENDS.finditer(kept) if found.end() > longest * 2 // 3]
    return kept[: ends[-1]] if ends else kept.rstrip() + " ..."
