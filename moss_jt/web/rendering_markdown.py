"""The same answers as Markdown in which nothing but what markup.py found is markup, for pages that render Markdown.

Every mark of punctuation in a text has a backslash before it, so that no reader of Markdown, however rich its own
dialect, sees more in it than a text. Formulas stand between $ and $$. What Streamlit would still make of a text that it
has read (:smile: a picture, -> an arrow) is parted by a character that has no width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from string import punctuation

from markdown_it.tree import SyntaxTreeNode

from moss_jt.web.markup import CITATION, DISPLAY_MATH, MATH, citation_of, cleaned, parse, safe_url
from moss_jt.web.rendering import Source

_PUNCTUATION = re.compile(f"[{re.escape(punctuation)}]")
_TICKS = re.compile("`+")
_LANGUAGE = re.compile(r"[A-Za-z0-9_+-]{1,30}")
_DRAWN = ("mermaid", "math")  # languages of code of which readers make drawings
_REPLACED = re.compile(r":(?=\d*[A-Za-z_+-][\w+-]*:)|(?<!\S)(?:<(?=->?(?!\S)|=(?!\S))|-(?=[->](?!\S))|[>~](?==(?!\S)))")
_JOINER = "\u2060"
Sources = Mapping[int, Source]


def answer_markdown(text: str, sources: Sequence[Source] = ()) -> str:
    """An answer, its citations as links to the sources that they point to."""
    return _blocks(SyntaxTreeNode(parse(text)), {source.number: source for source in sources})


def plain_markdown(text: str) -> str:
    """A text as it is, line by line."""
    return "\\\n".join(escaped(line) or "\u200b" for line in cleaned(text).strip("\n").split("\n"))


def source_markdown(source: Source) -> str:
    """A source as a link, or as its title where it is nowhere."""
    return _linked(source.url, escaped(source.title or source.url))


def escaped(text: str) -> str:
    """A piece of a line in which nothing is markup."""
    parted = _REPLACED.sub(rf"\g<0>{_JOINER}", cleaned(text).replace("\n", " "))
    return _PUNCTUATION.sub(r"\\\g<0>", parted)


def _blocks(node: SyntaxTreeNode, sources: Sources) -> str:
    return "\n\n".join(_block(child, sources) for child in node.children)


def _block(node: SyntaxTreeNode, sources: Sources) -> str:
    writer = _BLOCKS.get(node.type)
    if writer is not None:
        return writer(node, sources)
    if node.type in MATH:
        return f"$$\n{_tex(node)}\n$$"
    if node.children:
        return _blocks(node, sources)
    return escaped(node.content)


def _paragraph(node: SyntaxTreeNode, sources: Sources) -> str:
    return _inlines(node, sources)


def _heading(node: SyntaxTreeNode, sources: Sources) -> str:
    return f"{'#' * int(node.tag[1])} {_one_line(node, sources)}"


def _quote(node: SyntaxTreeNode, sources: Sources) -> str:
    return "\n".join(f"> {line}".rstrip() for line in _blocks(node, sources).split("\n"))


def _list(node: SyntaxTreeNode, sources: Sources) -> str:
    first = int(node.attrs.get("start", 1)) if node.type == "ordered_list" else None
    gap = "\n" if any(child.hidden for item in node.children for child in item.children) else "\n\n"
    items = []
    for number, item in enumerate(node.children):
        mark = f"{node.markup} " if first is None else f"{first + number}{item.markup or '.'} "
        written = gap.join(_block(child, sources) for child in item.children)
        items.append(mark + written.replace("\n", "\n" + " " * len(mark)))
    return gap.join(items)


def _code(node: SyntaxTreeNode, _: Sources) -> str:
    fence = "`" * max(3, 1 + max(map(len, _TICKS.findall(node.content)), default=0))
    named = _LANGUAGE.fullmatch(node.info.strip().partition(" ")[0])
    language = named[0] if named and named[0].lower() not in _DRAWN else ""
    return f"{fence}{language}\n{node.content.removesuffix(chr(10))}\n{fence}"


def _rule(_: SyntaxTreeNode, __: Sources) -> str:
    return "***"


def _table(node: SyntaxTreeNode, sources: Sources) -> str:
    rows = [row for part in node.children for row in part.children]
    lines = [f"| {' | '.join(_one_line(cell, sources) for cell in row.children)} |" for row in rows]
    lines.insert(1, f"|{'|'.join(_alignment(cell) for cell in rows[0].children)}|")
    return "\n".join(lines)


def _alignment(cell: SyntaxTreeNode) -> str:
    style = str(cell.attrs.get("style", ""))
    return {"text-align:center": ":-:", "text-align:right": "--:", "text-align:left": ":--"}.get(style, "---")


_BLOCKS: dict[str, Callable[[SyntaxTreeNode, Sources], str]] = {
    "paragraph": _paragraph,
    "heading": _heading,
    "blockquote": _quote,
    "bullet_list": _list,
    "ordered_list": _list,
    "fence": _code,
    "code_block": _code,
    "hr": _rule,
    "table": _table,
}


def _inlines(node: SyntaxTreeNode, sources: Sources) -> str:
    return "".join(_inline(child, sources) for child in node.children)


def _one_line(node: SyntaxTreeNode, sources: Sources) -> str:
    return _inlines(node, sources).replace("\\\n", " ").replace("\n", " ")


def _inline(node: SyntaxTreeNode, sources: Sources) -> str:
    if node.type in ("softbreak", "hardbreak"):
        return "\\\n"
    if node.type in MATH:
        mark = "$$" if node.type in DISPLAY_MATH else "$"
        return _in_cell(node, f"{mark}{' '.join(_tex(node).split())}{mark}")
    if node.type == CITATION:
        return _citation(node, sources)
    if node.type == "code_inline":
        return _in_cell(node, _code_inline(node.content))
    if node.type == "image":
        url = str(node.attrs.get("src", ""))
        words = escaped(node.content or url)
        return words if _is_in(node, "link") else _linked(url, words)
    return _around(node, sources)


def _around(node: SyntaxTreeNode, sources: Sources) -> str:
    """What has other inline nodes in it, and text."""
    mark = {"em": "*", "strong": "**", "s": "~~"}.get(node.type)
    if mark is not None:
        return f"{mark}{_inlines(node, sources)}{mark}"
    if node.type == "link":
        return _linked(str(node.attrs.get("href", "")), _inlines(node, sources))
    return _inlines(node, sources) if node.children else escaped(node.content)


def _code_inline(content: str) -> str:
    content = content.replace("\n", " ")
    ticks = "`" * (1 + max(map(len, _TICKS.findall(content)), default=0))
    return f"{ticks} {content} {ticks}"


def _citation(node: SyntaxTreeNode, sources: Sources) -> str:
    assert node.token is not None, "a citation has a token"
    found, linked = citation_of(node.token), _is_in(node, "link")
    if not any(number in sources for number in found.numbers):
        return escaped(found.text)
    return "".join(_cited(number, sources, linked) for number in found.numbers)


def _cited(number: int, sources: Sources, linked: bool) -> str:
    words, source = escaped(f"[{number}]"), sources.get(number)
    return words if source is None or linked else _linked(source.url, words)


def _linked(url: str, words: str) -> str:
    """A link where the address is one that may be followed, else its words; these are Markdown."""
    where = safe_url(url)
    return f"[{words}](<{escaped(where)}>)" if where else words


def _in_cell(node: SyntaxTreeNode, written: str) -> str:
    """What is not escaped, within a table: a bar would end its cell, whatever it stands in."""
    return written.replace("|", r"\|") if _is_in(node, "th", "td") else written


def _is_in(node: SyntaxTreeNode, *types: str) -> bool:
    parent = node.parent
    return parent is not None and (parent.type in types or _is_in(parent, *types))


def _tex(node: SyntaxTreeNode) -> str:
    """A formula without what would end it."""
    tex = re.sub(r"(?<!\\)((?:\\\\)*)\$", r"\1\\$", node.content.strip().replace("\n\n", "\n"))
    return re.sub(r"(?<!\\)((?:\\\\)*)\\$", r"\1", tex)
