"""Search: cleaning and cutting, and the back ends that ask somebody else, against a server on this machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from local_server import LocalServer, serving

from moss_jt.errors import ConfigError, ToolError
from moss_jt.tools.backends import search_backend
from moss_jt.tools.index import LocalIndex
from moss_jt.tools.search import LONGEST, clean, cleaned, cut, search_tool
from moss_jt.tools.search_web import Bing, Ddgs, SearxNg
from moss_jt.tools.tool import Hit, Status


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalServer]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving() as local:
        yield local


CLEANED = {
    "<b>bold</b> &amp; <a href='x'>link</a>": "bold & link",
    "a\r\n\r\n\n b \t c ": "a\nb c",
    "nul\x00 and \u200bzero\ufeff": "nul and zero",
    "2 < 3 and 4 > 1": "2 < 3 and 4 > 1",
    "&#x27;quoted&#x27;&nbsp;text": "'quoted' text",
    "<!-- no -->yes": "yes",
    "": "",
}


@pytest.mark.parametrize("text", CLEANED)
def test_clean(text: str) -> None:
    assert clean(text) == CLEANED[text]


def test_cut_at_a_sentence_or_with_dots() -> None:
    assert cut("short", 400) == "short"
    sentences = "This is a sentence. " * 40
    assert cut(sentences, 400).endswith("sentence.") and len(cut(sentences, 400)) <= 400
    assert cut("北京是首都。" * 100, 400).endswith("。")
    assert cut("x" * 1000, 400) == "x" * 396 + " ..."


def test_hits_are_cleaned_and_none_is_shown_twice() -> None:
    hits = [Hit("<p>a</p>"), Hit("a"), Hit(" "), Hit("b" * 999, "T\nitle"), Hit("c"), Hit("d")]
    found = cleaned(hits, 3)
    assert [hit.text for hit in found] == ["a", "b" * (LONGEST - 4) + " ...", "c"]
    assert found[1].title == "T itle"


def test_the_tool_asks_its_back_end() -> None:
    class Backend:
        name = "fake"
        asked: tuple[str, int] = ("", 0)

        def search(self, query: str, count: int) -> Sequence[Hit]:
            self.asked = (query, count)
            return [Hit("found")]

        def check(self) -> Status:
            return Status("ok", "")

    backend = Backend()
    assert search_tool(backend).run("  a \n b ", "c") == [Hit("found")]
    assert backend.asked == ("a b c", 3)
    with pytest.raises(ToolError, match="the query is empty"):
        search_tool(backend).run(" ")


def test_searxng(server: LocalServer) -> None:
    results = [{"title": "T", "content": "text", "url": "https://a.example"}, {"title": "only a title"}, "broken", {}]
    server.routes["/search"] = (200, {"results": results, "answers": ["42", {"answer": "43"}, 7]})
    found = SearxNg(server.url + "/").search("六 seven", 3)
    assert found[:2] == [Hit("42", "六 seven", direct=True), Hit("43", "六 seven", direct=True)]
    assert found[2:4] == [Hit("text", "T", "https://a.example"), Hit("only a title", "only a title")]
    assert server.asked[0].values == {"q": "六 seven", "format": "json"}
    assert SearxNg(server.url).check().state == "ok"


def test_bing(server: LocalServer) -> None:
    server.routes["/v7"] = (200, {"webPages": {"value": [{"name": "N", "url": "https://b.example", "snippet": "s"}]}})
    assert Bing("secret", f"{server.url}/v7").search("q", 3) == [Hit("s", "N", "https://b.example")]
    assert {key.lower(): value for key, value in server.asked[0].headers.items()}[
        "ocp-apim-subscription-key"
    ] == "secret"
    assert server.asked[0].values["q"] == "q"
    with pytest.raises(ToolError, match="needs a key: set MOSS_JT_SEARCH_KEY"):
        Bing("").search("q", 3)
    assert Bing("").check().state == "off"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((500, b"x"), "refuses: 500"),
        ((403, b"x"), "refuses: 403"),
        ((200, b"<html>"), "does not answer with JSON"),
        ((200, []), "does not answer as SearXNG does"),
        ((200, b"[" * 100_000), "does not answer with JSON"),
    ],
)
def test_a_server_that_fails(server: LocalServer, answer: Any, words: str) -> None:
    server.routes["/search"] = answer
    with pytest.raises(ToolError, match=words):
        SearxNg(server.url).search("q", 3)
    assert SearxNg(server.url).check().state == "fail"


def test_a_server_that_is_not_there(server: LocalServer) -> None:
    with serving() as other:
        url = other.url
    with pytest.raises(ToolError, match="cannot be reached"):
        SearxNg(url).search("q", 3)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x", "example.org", "http://", ""])
def test_only_servers_are_asked(url: str) -> None:
    with pytest.raises(ToolError, match="is no address of a server"):
        SearxNg(url)


def test_ddgs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def text(query: str, max_results: int) -> list[dict[str, str]]:
        asked.append((query, max_results))
        return [{"title": "T", "href": "https://d.example", "body": "b"}]

    module = ModuleType("ddgs")
    module.DDGS = lambda timeout: SimpleNamespace(text=text)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ddgs", module)
    assert Ddgs().search("q", 3) == [Hit("b", "T", "https://d.example")]
    assert asked == [("q", 6)]
    module.DDGS = lambda timeout: SimpleNamespace(text=lambda *_, **__: 1 / 0)  # type: ignore[attr-defined]
    with pytest.raises(ToolError, match="ddgs found nothing: division by zero"):
        Ddgs().search("q", 3)
    monkeypatch.setitem(sys.modules, "ddgs", None)
    with pytest.raises(ToolError, match=r"pip install ddgs"):
        Ddgs().search("q", 3)


def test_choosing_a_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(search_backend(), LocalIndex)
    assert isinstance(search_backend("ddgs"), Ddgs)
    assert isinstance(search_backend("bing=http://127.0.0.1:1/x"), Bing)
    monkeypatch.setenv("MOSS_JT_SEARCH", "searxng=http://127.0.0.1:1")
    assert isinstance(search_backend(), SearxNg)
    assert isinstance(search_backend("local"), LocalIndex)
    for wrong in ("google", "searxng", "local=x"):
        with pytest.raises(
            ConfigError, match="is no back end to search with; wanted is one of local, ddgs, searxng=URL"
        ):
            search_backend(wrong)
