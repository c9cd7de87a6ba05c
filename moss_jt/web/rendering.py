"""Texts of people, models and tools as HTML that can do nothing: no script, no style, no picture from elsewhere.

Everything is escaped that is not made here. An answer is Markdown (moss_jt.web.markup); all else is plain text.
The HTML has no line breaks and tabs, so that nothing that reads it as Markdown or cuts its lines changes it. Formulas stand
between FORMULAS, for KaTeX in the browser; no text can hold these marks.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Protocol

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

from moss_jt.web.markup import DISPLAY_MATH, MARKS, citation_of, cleaned, is_in_link, parse, safe_url

FORMULAS: list[dict[str, str | bool]] = [  # as KaTeX takes its delimiters
    {"left": MARKS[0], "right": MARKS[1], "display": False},
    {"left": MARKS[2], "right": MARKS[3], "display": True},
]
PICTURE_TYPES = ("image/png", "image/jpeg", "image/webp")
_LANGUAGE = re.compile(r"[A-Za-z0-9_+-]{1,30}")
_OPTIONS = MarkdownIt("commonmark", {"breaks": True}).options
_LINK = 'target="_blank" rel="noopener noreferrer nofollow"'


class Source(Protocol):
    """What the number of a citation points to; `url` is "" if it is nowhere."""

    @property
    def number(self) -> int: ...  # noqa: D102

    @property
    def title(self) -> str: ...  # noqa: D102

    @property
    def url(self) -> str: ...  # noqa: D102


def answer_html(text: str, sources: Sequence[Source] = ()) -> str:
    """An answer, its citations as links to the sources that they point to."""
    env = {"sources": {source.number: source for source in sources}}
    return _block("answer", _AnswerRenderer().render(parse(text), _OPTIONS, env).strip())


def plain_html(text: str, kind: str = "plain") -> str:
    """A text as it is; `kind` goes into its class, moss-KIND."""
    return _block(kind, escape(cleaned(text)))


def parts_html(parts: Iterable[tuple[str, str]]) -> str:
    """Texts as they are, each under its heading."""
    shown = (f"<p><b>{escape(head)}</b></p><pre>{escape(cleaned(text))}</pre>" for head, text in parts)
    return _block("parts", "".join(shown))


def table_html(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values."""
    lines = (f"<tr><th>{escape(name)}</th><td>{escape(cleaned(value))}</td></tr>" for name, value in rows)
    return _block("table", f"<table><tbody>{''.join(lines)}</tbody></table>")


def sources_html(sources: Iterable[Source]) -> str:
    """A list of sources; "" if there are none."""
    titles = ((source, " ".join(source.title.split()) or source.url) for source in sources)
    lines = [f"<li>[{source.number}] {_link(source.url, title)}</li>" for source, title in titles]
    return _block("sources", f"<ul>{''.join(lines)}</ul>") if lines else ""


def picture_html(content: bytes, type: str, words: str) -> str:
    """A picture, held by the page itself, with words for those who cannot see it; the words alone for other types."""
    if type not in PICTURE_TYPES:
        return plain_html(words, "note")
    image = f'<img src="data:{type};base64,{b64encode(content).decode()}" alt="{escape(cleaned(words))}">'
    return _block("picture", image)


def _block(kind: str, html: str) -> str:
    made = f'<div class="moss moss-{kind}" dir="auto">{html}</div>'
    return made.replace("\n", "&#10;").replace("\t", "&#9;")


def _link(url: str, words: str, title: str = "") -> str:
    """A link where the address is one that may be followed, else its words."""
    shown, where = escape(cleaned(words)), safe_url(url)
    named = f' title="{escape(cleaned(title))}"' if title else ""
    return f'<a href="{escape(where)}"{named} {_LINK}>{shown}</a>' if where else f"<span{named}>{shown}</span>"


class _AnswerRenderer(RendererHTML):
    """markdown-it's own renderer, but for code, links, pictures, formulas and citations."""

    def fence(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        """Code between fences; its language becomes a class if it is a plain word."""
        language = _LANGUAGE.fullmatch(tokens[idx].info.strip().partition(" ")[0])
        name = f' class="language-{language[0]}"' if language else ""
        return f"<pre><code{name}>{escape(tokens[idx].content)}</code></pre>"

    def link_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        """A link; markup.py let only http and https pass, and links to nowhere."""
        where = safe_url(str(tokens[idx].attrGet("href")))
        if not where:
            return "<a>"  # leads nowhere
        named = f' title="{escape(str(tokens[idx].attrGet("title")))}"' if tokens[idx].attrGet("title") else ""
        return f'<a href="{escape(where)}"{named} {_LINK}>'

    def image(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        """A picture from elsewhere is not fetched: it becomes a link to it."""
        url = str(tokens[idx].attrGet("src"))
        words = tokens[idx].content or url
        return escape(words) if is_in_link(tokens, idx) else _link(url, words)

    def math_inline(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        """A formula, for KaTeX."""
        left, right = MARKS[2:] if tokens[idx].type in DISPLAY_MATH else MARKS[:2]
        return f'<span class="moss-math">{left}{escape(tokens[idx].content.strip())}{right}</span>'

    math_inline_double = math_block = math_inline

    def citation(self, tokens: Sequence[Token], idx: int, options: Any, env: Mapping[str, Any]) -> str:
        """Numbers above the line, each a link if its source has an address."""
        found, sources = citation_of(tokens[idx]), env["sources"]
        if not any(number in sources for number in found.numbers):
            known = found.text.removeprefix("<sup>").removesuffix("</sup>")  # 10<sup>6</sup> cites nothing
            return f"<sup>{escape(known)}</sup>"
        linked = is_in_link(tokens, idx)
        return f"<sup>{''.join(_cited(number, sources, linked) for number in found.numbers)}</sup>"


def _cited(number: int, sources: Mapping[int, Source], linked: bool) -> str:
    source = sources.get(number)
    return f"[{number}]" if source is None or linked else _link(source.url, f"[{number}]", source.title)
