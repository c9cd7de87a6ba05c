"""What pages show of texts that nobody has checked: read again by readers that are not ours."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from xss import TEXTS

from moss_jt.web.client import Source
from moss_jt.web.markup import MARKS, cleaned, safe_url
from moss_jt.web.rendering import answer_html, parts_html, picture_html, plain_html, sources_html, table_html
from moss_jt.web.rendering_markdown import answer_markdown, escaped, plain_markdown, source_markdown

MORE = [
    "<ScRiPt >alert(1)</sCrIpT>",
    "<scr\x00ipt>alert(1)</script>",
    "<<script>alert(1)//<</script>",
    "<img src=`x` onerror=alert(1)>",
    "<img/src=x/onerror=alert(1)>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "<a href=javascript:alert(1)>x</a>",
    "<math><mtext><table><mglyph><style><img src onerror=alert(1)>",
    "<svg><animate onbegin=alert(1) attributeName=x dur=1s>",
    "<input autofocus onfocus=alert(1)>",
    "<!--><img src=x onerror=alert(1)>-->",
    "<![CDATA[<script>alert(1)</script>]]>",
    "<?xml version='1.0'?><x onclick='alert(1)'>",
    "<base href=//evil.example/>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "<link rel=stylesheet href=//evil.example/x.css>",
    "<object data=data:text/html,x>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&amp;lt;script&amp;gt;",
    "&#x3c;img src=x onerror=alert(1)&#x3e;",
    "\u2028<b>\u2029",
    "\ufeff<script>alert(1)</script>",
    "\ud800<b onclick=x>\udfff",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](javascript&colon;alert(1))",
    "[x](&#x6A;avascript:alert(1))",
    "[x](vbscript:msgbox(1))",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "[x](file:///etc/passwd)",
    "[x](//evil.example)",
    "[x](/gradio_api/logout)",
    "[x](#top)",
    "[x]()",
    "[x](<>)",
    "\\(<sup>x\\\\) $y\\$ \\(z\\$\\\\$ <b>\\)",
    '[x](https://e.example "onload=alert(1) \\"><b>")',
    "[x](https://e.example/\"onclick='alert(1)')",
    "[x](https://e.example/<b>)",
    "[<b onclick=alert(1)>](https://e.example)",
    "[x]\n\n[x]: javascript:alert(1)",
    "[x]\n\n[x]: https://e.example '\"><script>alert(1)</script>'",
    "![x](https://evil.example/a.png)",
    "![<b>](https://evil.example/a.png '\"><b>')",
    "![x](data:image/svg+xml,<svg onload=alert(1)>)",
    "[![x](https://evil.example/a.png)](https://e.example)",
    "<https://e.example/?<b>>",
    "<mailto:a@b.example>",
    "`<b>`",
    "``<b>` ``",
    "```<script>\n</code></pre><script>alert(1)</script>\n```",
    '```js" onload="alert(1)\nx\n```',
    "    <script>alert(1)</script>",
    "| <b> | `<i>` |\n|---|---|\n| \\| | <script>alert(1)</script> |",
    "$<b>$ $$<script>alert(1)</script>$$ \\(<i>\\) \\[<img src=x onerror=alert(1)>\\]",
    "$\\text{<script>alert(1)</script>}$",
    f"{MARKS[0]}\\href{{javascript:alert(1)}}{{x}}{MARKS[1]}",
    f"{MARKS[2]}<b>{MARKS[3]}",
    "<sup><|1|></sup><sup onclick=alert(1)>1</sup>",
    "<sup><|2|><|3|></sup> <sup><|1",
    "# <b onclick=alert(1)>",
    "> <script>\n- <script>\n1. <script>",
    "***<b>*** ~~<i>~~ _<u>_",
    "%%%LATEX_BLOCK_0%%% $x$",
    ":red[x] :smile: <span style='position:fixed'>",
]
EVERY = [*TEXTS.values(), *MORE]
SOURCES = (
    Source(1, "<b onclick=alert(1)>\"'&", "https://example.org/?a=1&b='2'"),
    Source(2, TEXTS["script"], "javascript:alert(1)"),
    Source(3, "three", 'https://example.org/"onclick="alert(1)'),
)
TAGS = {
    *[
        "div",
        "p",
        "b",
        "i",
        "span",
        "a",
        "sup",
        "ul",
        "ol",
        "li",
        "pre",
        "code",
        "br",
        "hr",
        "em",
        "strong",
        "s",
        "blockquote",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
    ],
    *["table", "thead", "tbody", "tr", "th", "td", "img"],
}
ATTRIBUTES = {"class", "dir", "href", "title", "target", "rel", "start", "style", "src", "alt"}
CLASS = re.compile(r"moss( moss-[a-z]+)?|moss-math|language-[\w+-]{1,30}")
VOID = {"br", "hr", "img"}


@dataclass
class Read(HTMLParser):
    """HTML as a browser would read it, with a complaint about everything that pages do not make."""

    text: str = ""
    links: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.links, self.tags, self.open = "", [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"{self.open} stay open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert name in ATTRIBUTES, (tag, name)
            self._check(tag, name, value or "")

    def _check(self, tag: str, name: str, value: str) -> None:
        if name == "href":
            assert value.startswith(("https://", "http://")), value
            self.links.append(value)
        elif name == "src":
            assert tag == "img" and re.fullmatch(r"data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/=]*", value), value
        elif name == "style":
            assert re.fullmatch("text-align:(left|right|center)", value), value
        elif name == "class":
            assert CLASS.fullmatch(value), value

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID, tag
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def handle_decl(self, decl: str) -> None:
        raise AssertionError(f"a declaration: {decl}")

    def handle_pi(self, data: str) -> None:
        raise AssertionError(f"an instruction: {data}")

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(f"a declaration: {data}")


def markdown_tokens(text: str) -> Iterator[Token]:
    """Markdown as a reader takes it who lets HTML through and knows formulas."""
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    for token in reader.use(dollarmath_plugin, double_inline=True).parse(text):
        yield token
        yield from token.children or ()


def check_markdown(text: str) -> None:
    """No HTML, no image, no link but to http and https."""
    for token in markdown_tokens(text):
        assert not token.type.startswith(("html", "image")), (token.type, token.content, text)
        if token.type == "link_open":
            assert str(token.attrGet("href")).startswith(("https://", "http://")), text


@pytest.mark.parametrize("text", EVERY)
def test_no_text_becomes_more_than_it_is(text: str) -> None:
    """In each place of a page."""
    answer = answer_html(f"{text} <sup><|1|></sup><sup><|2|></sup>", SOURCES)
    assert "\n" not in answer and "\t" not in answer
    read = Read(answer)
    assert "img" not in read.tags
    for html in (plain_html(text), parts_html([(text, text)]), table_html([(text, text)])):
        assert cleaned(text) in Read(html).text
    hostile = Source(1, text, text)
    assert Read(sources_html([hostile])).links == []
    assert set(Read(answer_html("<sup><|1|></sup>", [hostile])).links) <= {text}
    Read(picture_html(b"\x89PNG", "image/png", text))


@pytest.mark.parametrize("text", EVERY)
def test_no_text_becomes_more_than_it_is_in_markdown(text: str) -> None:
    check_markdown(answer_markdown(f"{text} <sup><|1|></sup><sup><|2|></sup>", SOURCES))
    check_markdown(plain_markdown(text))
    check_markdown(escaped(text))
    check_markdown(source_markdown(Source(1, text, text)))


@pytest.mark.parametrize("text", EVERY)
def test_a_plain_text_is_shown_letter_by_letter(text: str) -> None:
    assert Read(plain_html(text)).text == cleaned(text)


PIECES = [
    *"<>&\"'`$\\[](){}*_#|~!=+-/:;%\n\t ",
    *("a", "1", "中", "\n\n", "    ", "```", "$$", "\\(", "\\)", "\\[", "\\]", "javascript:", "https://e.example/"),
    *(
        "<b",
        "<script>",
        "</",
        "onclick=x",
        "<sup><|1|></sup>",
        "<sup>",
        "</sup>",
        "](",
        "![",
        "&lt;",
        "&#60;",
        MARKS[0],
    ),
]


@pytest.mark.parametrize("seed", range(8))
def test_no_heap_of_pieces_becomes_markup(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(120):
        text = "".join(draw.choices(PIECES, k=draw.randint(1, 40)))
        read = Read(answer_html(text, SOURCES))
        assert "img" not in read.tags
        check_markdown(answer_markdown(text, SOURCES))
        assert Read(plain_html(text)).text == cleaned(text)
        check_markdown(plain_markdown(text))


@pytest.mark.parametrize(
    ("text", "formulas"),
    [
        ("so $x^2$ is", ["x^2"]),
        ("so \\(x^2\\) is", ["x^2"]),
        ("so $$x^2$$ is", ["x^2"]),
        ("so \\[x^2\\] is", ["x^2"]),
        ("$$\nx\n- y\n$$", ["x\n- y"]),
        ("as in\n\\[\nx\n- y\n= z\n\\]\nand on", ["x\n- y\n= z"]),
        ("- a\n\n  \\[ x \\]\n- b", ["x"]),
        ("\\[ a \\] where \\( b < c \\)", ["a", "b < c"]),
        ("costs $5 and $6, or US$7", []),
        ("`$x$` and `\\(x\\)`", []),
        ("```\n$x$ \\[y\\]\n```", []),
        ("\\$x\\$ \\\\(y\\\\)", []),
        ("\\[ never ends", []),
        ("\\(\\)", []),
        (f"{MARKS[0]}x{MARKS[1]}", []),
    ],
)
def test_formulas_are_found(text: str, formulas: list[str]) -> None:
    pattern = f"[{MARKS[0]}{MARKS[2]}](.*?)[{MARKS[1]}{MARKS[3]}]"
    assert re.findall(pattern, Read(answer_html(text)).text, re.DOTALL) == formulas
    found = [token.content.strip() for token in markdown_tokens(answer_markdown(text)) if "math" in token.type]
    assert [" ".join(one.split()) for one in found] == [" ".join(one.split()) for one in formulas]


@pytest.mark.parametrize("code", ["if a < b:\n    `x` && '$y$'\n\n\tpass\n", "```\ninner\n```\n", "&lt;b&gt;\n", "\n"])
def test_code_stays_as_it_is(code: str) -> None:
    answer = f"~~~~python\n{code}~~~~\nand after"
    assert Read(answer_html(answer)).text.startswith(code)
    assert 'class="language-python"' in answer_html(answer)
    (fence,) = [token for token in markdown_tokens(answer_markdown(answer)) if token.type == "fence"]
    assert (fence.content, fence.info) == (code, "python")


def test_a_citation_leads_to_its_source() -> None:
    text = "It rains<sup><|1|></sup>, so<sup><|1|><|2|></sup>, 10<sup>6</sup>, [x<sup><|1|></sup>](https://e.example)."
    read = Read(answer_html(text, SOURCES[:2]))
    assert read.text == "It rains[1], so[1][2], 106, x[1]."
    assert read.links == [SOURCES[0].url, SOURCES[0].url, "https://e.example"]
    links = [
        str(token.attrGet("href"))
        for token in markdown_tokens(answer_markdown(text, SOURCES[:2]))
        if token.type == "link_open"
    ]
    assert links == [SOURCES[0].url, SOURCES[0].url, "https://e.example"]


def test_a_picture_from_elsewhere_is_a_link() -> None:
    read = Read(answer_html("![a cat](https://example.org/cat.png)"))
    assert (read.text, read.links) == ("a cat", ["https://example.org/cat.png"])


def test_only_a_picture_is_shown_as_one() -> None:
    assert "img" in Read(picture_html(b"x", "image/png", "words")).tags
    for type in ("image/svg+xml", "text/html", "", 'image/png"><script>'):
        read = Read(picture_html(b"<svg onload=alert(1)>", type, "words"))
        assert (read.tags, read.text) == (["div"], "words")


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("https://example.org/a?b=c#d", True),
        ("http://127.0.0.1:8000/", True),
        ("https://例子.example/路径", True),
        ("HTTPS://EXAMPLE.ORG", True),
        ("javascript:alert(1)", False),
        (" javascript:alert(1)", False),
        ("java\nscript:alert(1)", False),
        ("https:example.org", False),
        ("https://", False),
        ("//example.org", False),
        ("data:text/html,x", False),
        ("https://e.example/ x", False),
        ('https://e.example/"><b>', False),
        ("https://e.example\\@evil.example", False),
        ("http://[::1", False),
        ("", False),
    ],
)
def test_which_links_may_be_followed(url: str, safe: bool) -> None:
    assert safe_url(url) == (url if safe else "")


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("a\nb", ["p", "br"]),
        ("# Title\n\ntext", ["h1", "p"]),
        ("- a\n- b\n  - c\n\n1. x", ["ul", "li", "li", "ul", "li", "ol", "li"]),
        ("> quote\n\nafter", ["blockquote", "p", "p"]),
        ("| a |\n|--:|\n| 1 |", ["table", "thead", "tr", "th", "tbody", "tr", "td"]),
        ("*a* **b** ~~c~~ `d`", ["p", "em", "strong", "s", "code"]),
        ("---", ["hr"]),
        ("中文**粗体**，以及 `代码`。", ["p", "strong", "code"]),
    ],
)
def test_markdown_is_shown_as_what_it_means(text: str, tags: list[str]) -> None:
    assert Read(answer_html(text)).tags == ["div", *tags]
