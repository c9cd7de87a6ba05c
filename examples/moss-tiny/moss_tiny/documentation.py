"""Search over the product's own documentation, with the local index that users have."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from moss_jt.tools.index import LocalIndex
from moss_jt.tools.search import HITS, cleaned
from moss_jt.tools.tool import Hit

ROOT = Path(__file__).parents[3]
PAGES = ("README.md", "README.zh.md", "docs/cli.md")


class Documentation:
    """The product's pages, indexed.

    Args:
        folder: where copies of the pages and the index are put.
    """

    def __init__(self, folder: Path) -> None:
        pages = folder / "pages"
        pages.mkdir(parents=True, exist_ok=True)
        for name in PAGES:
            shutil.copy(ROOT / name, pages / Path(name).name)
        self._index = LocalIndex(folder / "pages.sqlite")
        self._index.add(pages)
        self.search = cache(self._search)

    def _search(self, query: str) -> Sequence[Hit]:
        """What Search(query) finds."""
        return cleaned(self._index.search(query, HITS), HITS)
