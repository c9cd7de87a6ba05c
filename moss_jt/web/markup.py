"""Answers read as Markdown, without HTML: code, tables, formulas, citations, links to http(s) and nothing else.

What is no Markdown stays text. Both pages render the tokens that come from here, each in its own form.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin

from moss_jt.tools.citations import Citation, citation_at

CITATION = "citation"  # type of a token; meta["citation"] holds it
DISPLAY_MATH = frozenset({"math_block", "math_inline_double"})
MATH = DISPLAY_MATH | {"math_inline"}

MARKS = ("\ue0f0", "\ue0f1", "\ue0f2", "\ue0f3")  # our own around formulas; no text may hold them
_NOT_TEXT = re.compile(f"[{''.join(MARKS)}\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_FORMULA = {  # up to its end, which no backslash of its own takes away, as in \\\\)
    end: re.compile(rf"((?:[^\\]|\\(?!{re.escape(end[1])}).)*){re.escape(end)}", re.DOTALL) for end in (r"\)", r"\]")
}
_NOT_IN_URL = re.compile(r"[\s\x00-\x1f\x7f\\<>\"`]")


def cleaned(text: str) -> str:
    """A text without control characters and halves of characters."""
    return _NOT_TEXT.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def safe_url(url: str) -> str:
    """A link that may be shown: http or https, with a host; else ""."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    fine = parts.scheme in ("http", "https") and parts.netloc and not _NOT_IN_URL.search(url)
    return url if fine else ""


def parse(text: str) -> list[Token]:
    """The tokens of an answer; inline ones are children of "inline" tokens."""
    return _parser().parse(cleaned(text))


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True, "linkify": False})
    parser.enable(["table", "strikethrough"])
    parser.use(dollarmath_plugin, allow_labels=False, allow_space=False, allow_digits=False, double_inline=True)
    parser.inline.ruler.before("escape", "math_brackets", _math_in_brackets)
    parser.inline.ruler.before("escape", CITATION, _citation)
    interrupted = ["paragraph", "reference", "blockquote", "list"]
    parser.block.ruler.before("fence", "math_brackets_block", _block_in_brackets, {"alt": interrupted})
    parser.validateLink = lambda url: bool(safe_url(url))  # type: ignore[method-assign]
    return parser


def _math_in_brackets(state: StateInline, silent: bool) -> bool:
    r"""\( … \) and \[ … \] within a paragraph."""
    for opening, closing, kind in ((r"\(", r"\)", "math_inline"), (r"\[", r"\]", "math_inline_double")):
        if state.src.startswith(opening, state.pos):
            found = _FORMULA[closing].match(state.src, state.pos + 2, state.posMax)
            if found is None or not found[1].strip():
                return False
            if not silent:
                token = state.push(kind, "math", 0)
                token.content, token.markup = found[1], opening
            state.pos = found.end()
            return True
    return False


def _block_in_brackets(state: StateBlock, first: int, end: int, silent: bool) -> bool:
    r"""\[ at the begin of a line up to \] at the end of one, whatever stands on the lines between."""
    if state.is_code_block(first) or not _line(state, first).startswith(r"\["):
        return False
    lines: list[str] = []
    for number in range(first, end):
        if state.sCount[number] < state.blkIndent and lines and _line(state, number):
            return False  # the list item that it began in is over
        lines.append(_line(state, number))
        if lines[-1].endswith(r"\]"):
            break
    else:
        return False
    content = "\n".join(lines)[2:-2].strip()
    if not content or r"\]" in content:
        return False
    if not silent:
        token = state.push("math_block", "math", 0)
        token.block, token.content, token.markup = True, content, r"\["
        token.map = [first, first + len(lines)]
        state.line = first + len(lines)
    return True


def _line(state: StateBlock, number: int) -> str:
    return state.src[state.bMarks[number] + state.tShift[number] : state.eMarks[number]].strip()


def _citation(state: StateInline, silent: bool) -> bool:
    """<sup><|1|></sup>, where it points to a source or holds a bare number."""
    if state.src[state.pos] != "<":
        return False
    found = citation_at(state.src, state.pos)
    if found is None or state.pos + len(found.text) > state.posMax:
        return False
    if not silent:
        token = state.push(CITATION, "", 0)
        token.meta = {CITATION: found}
        token.content = found.text
    state.pos += len(found.text)
    return True


def citation_of(token: Token) -> Citation:
    """The citation that a token holds."""
    found = token.meta[CITATION]
    assert isinstance(found, Citation), "the rule above puts it there"
    return found


def is_in_link(tokens: Sequence[Token], index: int) -> bool:
    """Whether an inline token stands between those that open and close a link."""
    depth = sum(token.nesting for token in tokens[:index] if token.type in ("link_open", "link_close"))
    return depth > 0
