"""Search back ends that ask somebody else: the ddgs library, a SearXNG instance, a Bing-compatible API."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from moss_jt.errors import ToolError
from moss_jt.language import pick
from moss_jt.tools.tool import Hit, Status
from moss_jt.tools.web import check_url, fetch_json, with_query

TIMEOUT = 10.0  # seconds that a server may be silent
BING = "https://api.bing.microsoft.com/v7.0/search"
_TRIED = "MOSS Fudan"  # what is searched for to try a back end


class Ddgs:
    """Several public engines through the library `ddgs` (the extra "search")."""

    name = "ddgs"

    def search(self, query: str, count: int) -> Sequence[Hit]:
        """Ask the library."""
        try:
            from ddgs import DDGS
        except ImportError as error:
            raise ToolError("the library ddgs is not installed. Run: pip install ddgs") from error
        try:
            found = DDGS(timeout=int(TIMEOUT)).text(query, max_results=2 * count)
        except Exception as error:  # it has errors of many kinds, and none of them is ours
            raise ToolError(f"ddgs found nothing: {error}.") from error
        return _hits(found, text="body", title="title", url="href")

    def check(self) -> Status:
        """Search for something, where the library is installed."""
        if find_spec("ddgs") is None:
            return Status("off", pick("pip install ddgs", "请安装：pip install ddgs"))
        return tried(lambda: self.search(_TRIED, 1))


class SearxNg:
    """A SearXNG instance whose settings allow the format "json".

    Args:
        url: of the instance, as http://127.0.0.1:8888.
    """

    name = "searxng"

    def __init__(self, url: str) -> None:
        self._url = check_url(url)

    def search(self, query: str, count: int) -> Sequence[Hit]:
        """Ask the instance; what it answers by itself comes first."""
        found = fetch_json(with_query(f"{self._url}/search", {"q": query, "format": "json"}), timeout=TIMEOUT)
        if not isinstance(found, dict):
            raise ToolError(f"{self._url} does not answer as SearXNG does.")
        direct = [_direct(query, answer) for answer in _list(found.get("answers"))]
        return [*filter(None, direct), *_hits(_list(found.get("results")), text="content", title="title", url="url")]

    def check(self) -> Status:
        """Search for something."""
        return tried(lambda: self.search(_TRIED, 1))


class Bing:
    """An API that answers as Bing's web search does.

    Args:
        key: sent as Ocp-Apim-Subscription-Key.
        url: of the search itself.
    """

    name = "bing"

    def __init__(self, key: str, url: str = BING) -> None:
        self._key = key
        self._url = check_url(url)

    def search(self, query: str, count: int) -> Sequence[Hit]:
        """Ask the API."""
        if not self._key:
            raise ToolError("a Bing-compatible search needs a key: set MOSS_JT_SEARCH_KEY.")
        url = with_query(self._url, {"q": query, "count": 2 * count, "textFormat": "Raw"})
        found = fetch_json(url, timeout=TIMEOUT, headers={"Ocp-Apim-Subscription-Key": self._key})
        pages = found.get("webPages") if isinstance(found, dict) else None
        values = pages.get("value") if isinstance(pages, dict) else []
        return _hits(_list(values), text="snippet", title="name", url="url")

    def check(self) -> Status:
        """Search for something, where there is a key."""
        if not self._key:
            return Status("off", pick("set MOSS_JT_SEARCH_KEY", "请设置 MOSS_JT_SEARCH_KEY"))
        return tried(lambda: self.search(_TRIED, 1))


def tried(search: Callable[[], object]) -> Status:
    """What came of a search, in words."""
    try:
        search()
    except ToolError as error:
        return Status("fail", str(error))
    return Status("ok", pick("answers", "可以搜索"))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _direct(query: str, answer: Any) -> Hit | None:
    """An answer to the question itself: SearXNG gives a text, or an object that holds it."""
    text = answer.get("answer") if isinstance(answer, dict) else answer
    return Hit(text, title=query, direct=True) if isinstance(text, str) and text else None


def _hits(found: Sequence[Any], *, text: str, title: str, url: str) -> list[Hit]:
    """Hits from objects with keys of these names; what is not as expected is passed over."""
    return [
        Hit(_text(one, text) or _text(one, title), _text(one, title), _text(one, url))
        for one in found
        if isinstance(one, Mapping)
    ]


def _text(one: Mapping[str, Any], key: str) -> str:
    value = one.get(key)
    return value if isinstance(value, str) else ""
