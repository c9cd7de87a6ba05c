"""Tools for tests of the server and of its pages: they find and draw at once what they are told to."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from moss_jt.server.calls import DrawnPicture, FoundSource, ToolResults
from moss_jt.tools import png

SOURCES = (FoundSource(1, "A page", "https://example.org/page"), FoundSource(2, "A book", ""))
PICTURE = png.lettered(("A CAT",), width=120, height=48, dot=2, text="a cat")


class FindingTools:
    """Finds the same for every call; implements `moss_jt.server.calls.ToolRunner`.

    Args:
        text: what stands in the results besides.
    """

    enabled: Sequence[str] = ("search",)

    def __init__(self, text: str = "it rains", sources: tuple[FoundSource, ...] = SOURCES) -> None:
        self.text = text
        self.sources = sources

    def run(self, commands: str) -> ToolResults | None:
        if commands == "None":
            return None
        picture = DrawnPicture(secrets.token_hex(16), "image/png", "a sketch", PICTURE)
        return ToolResults(f"{commands} =>\n<|1|>: '{self.text}'", self.sources, (picture,))
