"""What the model wrote in the Commands field, as calls.

The model was trained to write `Name("argument"), Name("argument")`, and mostly does. It also writes numbers and
comments around calls, "None" with a reason, one call a line, a second argument, quotes inside quotes, or
leaves a quote or a bracket open. `parse_commands` takes any text, never raises, and tells what it passed over.

Nothing is looked up here: a call may name a tool that does not exist. Whether it may run is for the toolbox.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_CHARACTERS = 20_000  # of a field; what comes after is not looked at
MAX_CALLS = 100  # of a field; a turn of the training data has ten at most

_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "”": "”", "「": "」", "`": "`", "＂": "＂"}
_CLOSING = frozenset(_QUOTES.values())
_OPEN, _CLOSE = "(（", ")）"
_BETWEEN = re.compile(r"(?:[\s,;，；、。|&]|(?:\(?\d{1,3}[.)、:：](?!\d)|[-*•])(?=\s*\S))+")
_NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_]{0,63})[ \t]*[(（]")
_NONE = re.compile(r"(?:none|non|null|n/a|无|没有|不需要)(?![A-Za-z0-9_])", re.IGNORECASE)
_PIECE = re.compile(r"[^\n,;，；]*")
_COMMENT = re.compile(r"(?:#|//)[^\n]*")
_ENDS = re.compile(r"[ \t]*(?:$|[\n\r,;，；、。.#<|&]|//|[A-Za-z_][A-Za-z0-9_]*[ \t]*[(（])")
_NEXT_CALL = re.compile(r"[\s,;，；、]*(?:$|#|none\b|\d{1,3}[.)]\s|[A-Za-z_][A-Za-z0-9_]*[ \t]*[(（])", re.IGNORECASE)
_KEYWORD = re.compile(r"[A-Za-z_]\w*\s*=\s*(?=[\"'“‘])")
_STRING = r"(?:\"[^\"]*\"|'[^']*'|str\([^()\"']*\))"
_JOINED = re.compile(rf"{_STRING}(?:\s*\+\s*{_STRING})+")


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        name: of the API, as it was written.
        arguments: without their quotes; one for everything between the brackets where that is no list of texts.
        text: the call as it was written, from the name to the closing bracket.
    """

    name: str
    arguments: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Commands:
    """What a Commands field was understood to say.

    Attributes:
        calls: in the order in which they were written.
        skipped: what is neither a call nor a None nor a comment.
    """

    calls: tuple[Call, ...] = ()
    skipped: tuple[str, ...] = ()

    def describe(self) -> str:
        """What was understood, in one line."""
        parts = [" ".join(call.text.split()) for call in self.calls] or ["no call"]
        if self.skipped:
            parts.append(f"passed over: {', '.join(map(repr, self.skipped))}")
        return "; ".join(parts)


def parse_commands(text: str) -> Commands:
    """Read a Commands field, without its tag and its end marker. Takes any text, never raises."""
    text = text[:MAX_CHARACTERS]
    calls: list[Call] = []
    skipped: list[str] = []
    at = 0
    while at < len(text) and len(calls) < MAX_CALLS:
        start = _end(_BETWEEN.match(text, at), at)
        comment = _COMMENT.match(text, start)
        none = _NONE.match(text, start)
        named = _NAME.match(text, start)
        if start >= len(text):
            break
        if comment:
            at = comment.end()
        elif none:
            at = _end_of_piece(text, none.end())
        elif named:
            at, inner = _close(text, named.end())
            calls.append(Call(named[1], _arguments(inner), text[start:at].strip()))
        else:
            at = max(_end_of_piece(text, start), start + 1)
            skipped.append(text[start:at].strip())
    return Commands(tuple(calls), tuple(piece for piece in skipped if piece))


def _end(found: re.Match[str] | None, otherwise: int) -> int:
    return found.end() if found else otherwise


def _end_of_piece(text: str, start: int) -> int:
    """Where prose, or the reason behind a None, ends: at a line's end, a comma or a semicolon."""
    return _end(_PIECE.match(text, start), start)


def _close(text: str, start: int) -> tuple[int, str]:
    """Where the call ends whose brackets were opened before `start`, and what is between them.

    In this order: the bracket that matches, quotes respected; one behind a quote, or one that the next call
    follows (a quote was left open); the bracket that matches with quotes ignored; the end of the line.
    """
    balanced = _balanced(text, start, quotes=True)
    if balanced is not None and _ENDS.match(text, balanced + 1):
        return balanced + 1, text[start:balanced]
    if text[start:].lstrip()[:1] in _QUOTES:
        for at in _closing_brackets(text, start):
            if _NEXT_CALL.match(text, at + 1) and (text[:at].rstrip()[-1] in _CLOSING or text[at + 1 :].strip()):
                return at + 1, text[start:at]
    for end in (balanced, _balanced(text, start, quotes=False)):
        if end is not None:
            return end + 1, text[start:end]
    line = text.find("\n", start)
    end = len(text) if line < 0 else line
    return end, text[start:end]


def _closing_brackets(text: str, start: int) -> Iterator[int]:
    """The places of closing brackets, the first few hundred: nobody means more."""
    found = re.finditer("[)）]", text[start : start + 2000])
    yield from (start + one.start() for one, _ in zip(found, range(300), strict=False))


def _balanced(text: str, start: int, *, quotes: bool) -> int | None:
    """The place of the bracket that closes what was opened before `start`.

    Only the kind of quote that the argument begins with counts: an apostrophe is no quote in a text in
    double quotes.
    """
    first = text[start:].lstrip()[:1]
    opening, closing = (first, _QUOTES[first]) if quotes and first in _QUOTES else ("", "")
    depth, at, inside = 1, start, False
    while at < len(text):
        character = text[at]
        if inside:
            if character == "\\":
                at += 1
            elif character == closing:
                inside = False
        elif opening and character == opening:
            inside = True
        elif character in _OPEN:
            depth += 1
        elif character in _CLOSE:
            depth -= 1
            if not depth:
                return at
        at += 1
    return None


def _arguments(inner: str) -> tuple[str, ...]:
    """The arguments between the brackets."""
    inner = inner.strip()
    if _JOINED.fullmatch(inner):
        parts = re.findall(_STRING, inner)
        return ("".join(part[4:-1].strip() if part.startswith("str(") else part[1:-1] for part in parts),)
    pieces = [_KEYWORD.sub("", piece.strip(), count=1) for piece in _split_at_commas(inner)]
    if pieces and pieces[-1] == "":
        pieces.pop()
    if pieces and all(map(_is_quoted, pieces)):
        return tuple(map(_unquoted, pieces))
    whole = _KEYWORD.sub("", inner, count=1)
    return (_unquoted(whole),) if whole else ()


def _split_at_commas(inner: str) -> list[str]:
    """Split at the commas that stand outside of double quotes."""
    pieces, at, inside = [""], 0, ""
    while at < len(inner):
        character = inner[at]
        if character == "\\" and inside:
            pieces[-1] += inner[at : at + 2]
            at += 2
            continue
        if inside:
            inside = "" if character == _QUOTES[inside] else inside
        elif character in _QUOTES and not pieces[-1].strip():
            inside = character
        if character in ",，" and not inside:
            pieces.append("")
        else:
            pieces[-1] += character
        at += 1
    return pieces


def _is_quoted(piece: str) -> bool:
    """Whether a piece is one text in quotes, with none of them within."""
    if len(piece) < 2 or piece[0] not in _QUOTES or piece[-1] != _QUOTES[piece[0]]:
        return False
    return _QUOTES[piece[0]] not in piece[1:-1].replace("\\" + piece[-1], "")


def _unquoted(piece: str) -> str:
    """A piece without the quotes around it, if there are any; one that was left open is removed too."""
    if piece[:1] in _QUOTES:
        closing = _QUOTES[piece[0]]
        piece = piece[1:]
        if piece.endswith(closing):
            piece = piece[:-1]
        piece = piece.replace("\\" + closing, closing)
    return piece.strip()
