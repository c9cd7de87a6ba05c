"""Tools whose results follow from their call, run as the server runs real ones."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from moss_jt.server.tool_runner import BoxRunner
from moss_jt.tools import Hit, Tool, ToolBox
from moss_jt.tools.drawing import drawing_tool
from moss_jt.tools.png import lettered
from moss_jt.tools.tool import Status

WIDTH, HEIGHT = 160, 90  # of the picture
EVIL_URL = "javascript:alert('a source')"


def find(*queries: str) -> list[Hit]:
    """Two hits that repeat the query: a page, and one whose address would run a script."""
    query = " ".join(queries)
    page = f"https://example.org/?q={quote(query)}"
    return [Hit(f"about {query}", f"Page of {query}", page), Hit(f"more of {query}", f"Trap of {query}", EVIL_URL)]


class Letters:
    """Draws the same small picture of everything."""

    name = "letters"
    note = "A picture of a test."

    def draw(self, description: str) -> bytes:
        return lettered(("A TEST",), width=WIDTH, height=HEIGHT, dot=3, text=description)

    def check(self) -> Status:
        return Status("ok", "")


def toy_tools(folder: Path) -> BoxRunner:
    """A search and a drawing tool; pictures go to the folder."""
    search = Tool("search", "Web search", "Search(query)", find)
    return BoxRunner(ToolBox([search, drawing_tool(Letters(), folder)]))
