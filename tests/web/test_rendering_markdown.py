"""Answers as Markdown: another reader of Markdown sees the texts that were put in, and no markup but ours."""

from __future__ import annotations

import re
from html import unescape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from xss import TEXTS

from moss_jt.web.client import Source
from moss_jt.web.markup import cleaned
from moss_jt.web.rendering_markdown import answer_markdown, escaped, source_markdown

JOINER = "\u2060"
SOURCES = (Source(1, "First *page*", "https://example.org/a_b?c=(d)"), Source(2, "Trap", "javascript:alert(1)"))


def read(markdown: str) -> str:
    """HTML as a reader that takes GitHub's dialect makes it, HTML in the text included."""
    html: str = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown)
    return html


def text_of(html: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "", html)).strip().replace(JOINER, "")


@pytest.mark.parametrize("name", TEXTS)
def test_an_escaped_text_is_one_paragraph_of_text(name: str) -> None:
    text = " ".join(TEXTS[name].split())
    html = read(escaped(text))
    assert re.sub("^<p>|</p>\n$", "", html).count("<") == 0, html
    assert text_of(html) == text


@settings(max_examples=300, deadline=None, database=None)
@given(st.text(st.sampled_from("ab1 \\`*_{}[]()<>#+-.!|~$:&;=\"'/@^%,?")))
def test_no_text_has_markup(text: str) -> None:
    html = read(escaped(text.strip()))
    assert text_of(html) == cleaned(text).strip()
    assert html == "" or set(re.findall(r"<[^>]*>", html)) == {"<p>", "</p>"}


@pytest.mark.parametrize("name", TEXTS)
def test_an_answer_has_no_html_and_leads_nowhere_but_to_pages(name: str) -> None:
    html = read(answer_markdown(TEXTS[name], SOURCES))
    tags = set(re.findall(r"<(\w+)", html))
    assert tags <= {"p", "a", "br", "pre", "code", "em", "strong"}, html
    assert all(url.startswith(("http://", "https://")) for url in re.findall(r'href="([^"]*)"', html)), html


def test_markdown_stays_markdown() -> None:
    text = "# Head\n\n- **a** *b*\n- `c|d`\n\n1. x\n2. y\n\n> q\n\n| a | b |\n|---|--:|\n| `x` | ~~y~~ |\n\n```py\n`a` < b\n```\n"
    assert read(answer_markdown(text)) == read(text)


def test_citations_are_links_to_pages() -> None:
    html = read(answer_markdown("So<sup><|1|></sup>, <sup><|2|></sup> and 10<sup>6</sup>.", SOURCES))
    assert '<a href="https://example.org/a_b?c=(d)">[1]</a>' in html
    assert ", [2] and 10" in html and html.count("<a") == 1
    assert text_of(html).endswith("10<sup>6</sup>.")
    assert read(source_markdown(SOURCES[0])).count("First *page*") == 1
    assert read(source_markdown(SOURCES[1])) == "<p>Trap</p>\n"


def test_formulas_have_dollars_and_texts_have_none() -> None:
    assert answer_markdown(r"\(x^2\) and $y$") == r"$x^2$ and $y$"
    assert answer_markdown("\\[\nx\n\\]") == "$$\nx\n$$"
    assert answer_markdown("it costs $5 or $6") == r"it costs \$5 or \$6"


@pytest.mark.parametrize(
    "text", [":smile:", ":material_home:", ":streamlit:", "a -> b", "x >= 3", "rm -- x", "<-> <- <="]
)
def test_what_streamlit_replaces_is_parted(text: str) -> None:
    assert JOINER in escaped(text)
    assert text_of(read(escaped(text))) == text


@pytest.mark.parametrize("text", ["10:30:20", "a->b", "x>=3", "--memory 6GiB", "https://example.org:8080/a:b"])
def test_other_texts_are_left_alone(text: str) -> None:
    assert JOINER not in escaped(text)


@pytest.mark.parametrize("language", ["mermaid", "Math"])
def test_code_is_not_drawn(language: str) -> None:
    assert answer_markdown(f"```{language}\na-->b\n```") == "```\na-->b\n```"


def test_a_bar_in_code_does_not_end_a_cell() -> None:
    html = read(answer_markdown("| a |\n|---|\n| `x\\|y` |\n\n`x|y`"))
    assert html.count("<td>") == 1 and html.count("<code>x|y</code>") == 2
