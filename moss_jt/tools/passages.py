"""A user's documents as passages of plain text: which files count, what they say, where they are cut."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

PLAIN = frozenset(
    {".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org", ".tex", ".log", ".csv", ".tsv", ".srt"}
)
HTML = frozenset({".html", ".htm", ".xhtml"})
LONGEST = 600  # characters of a passage; a search shows 400 of them
LARGEST = 20 << 20  # bytes of a file
_LEFT_OUT = (".", "__pycache__", "node_modules")  # beginnings of the names of folders
_SILENT = frozenset({"script", "style", "noscript", "template", "nav", "footer", "svg"})
_OF_HEAD = frozenset({"base", "link", "meta", "noscript", "script", "style", "template", "title"})
_BLOCKS = frozenset(
    [
        "p",
        "div",
        "br",
        "li",
        "ul",
        "ol",
        "tr",
        "table",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "section",
        "article",
        "pre",
        "blockquote",
        "dt",
        "dd",
        "figcaption",
        "main",
        "header",
    ]
)
_MARKDOWN_HEADING = re.compile(r"#{1,6}\s+(.+?)\s*#*$")
_UNDERLINE = re.compile(r"([=\-~^\"'*+#`])\1{2,}\s*$")
_SENTENCE = re.compile("(?<=[。！？；])|(?<=[.!?;])\\s+")


@dataclass(frozen=True)
class Passage:
    """A piece of a document, under the heading that it stands below ("" for none)."""

    heading: str
    text: str


def documents(folder: Path) -> Iterator[Path]:
    """The files below a folder that can be read, in order; hidden ones and links to elsewhere are left out."""
    if folder.is_file():
        yield folder
        return
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(_LEFT_OUT))
        for name in sorted(names):
            path = Path(here, name)
            if _is_document(path):
                yield path


def covers(folder: Path, path: Path) -> bool:
    """Whether `documents` of a folder come by a file, or by a folder, below it; both absolute."""
    if folder == path or not path.is_relative_to(folder):
        return False
    within = path.relative_to(folder).parts
    steps = [folder.joinpath(*within[:count]) for count in range(1, len(within) + 1)]
    if path.is_file() and not _is_document(steps.pop()):
        return False
    return not any(step.name.startswith(_LEFT_OUT) or step.is_symlink() for step in steps)


def _is_document(path: Path) -> bool:
    return path.suffix.lower() in PLAIN | HTML and not path.name.startswith(".") and not path.is_symlink()


def read_passages(path: Path) -> list[Passage]:
    """The passages of a file; none where it is no text or too large.

    Raises:
        OSError: it cannot be read.
    """
    if path.stat().st_size > LARGEST:
        return []
    content = path.read_bytes()
    if b"\0" in content[:4096] and not content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return []
    text = _decoded(content)
    return list(split(_html_text(text) if path.suffix.lower() in HTML else text))


def _decoded(content: bytes) -> str:
    """Text in the encodings that such files have."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", "replace")
    for encoding in ("utf-8-sig", "gb18030"):
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    return content.decode("latin-1")


def split(text: str) -> Iterator[Passage]:
    """Cut a text at its headings and empty lines, and long paragraphs at the ends of sentences."""
    heading, held = "", ""
    for block, is_heading in _blocks(text):
        if is_heading:
            if held:
                yield Passage(heading, held)
            heading, held = block, ""
            continue
        for piece in _pieces(block):
            if held and len(held) + len(piece) >= LONGEST:
                yield Passage(heading, held)
                held = ""
            held = f"{held}\n{piece}" if held else piece
    if held:
        yield Passage(heading, held)


def _blocks(text: str) -> Iterator[tuple[str, bool]]:
    """Paragraphs, and whether each is a heading (of Markdown, or underlined as in reStructuredText)."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    held: list[str] = []
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        found = _MARKDOWN_HEADING.match(line)
        underlined = bool(line.strip()) and not held and len(line) < 120 and _UNDERLINE.match(after)
        if found or underlined or not line.strip() or _UNDERLINE.match(line):
            if held:
                yield "\n".join(held), False
                held = []
            if found or underlined:
                yield (found[1] if found else line.strip()), True
        else:
            held.append(line.rstrip())
    if held:
        yield "\n".join(held), False


def _pieces(block: str) -> Iterator[str]:
    """A paragraph in pieces of at most `LONGEST` characters."""
    if len(block) <= LONGEST:
        yield block
        return
    held = ""
    for sentence in _SENTENCE.split(block):
        for start in range(0, len(sentence), LONGEST):
            piece = sentence[start : start + LONGEST]
            if held and len(held) + len(piece) > LONGEST:
                yield held
                held = ""
            held = f"{held} {piece}" if held and held[-1].isascii() else held + piece
    if held.strip():
        yield held


class _Text(HTMLParser):
    """The text of a page; headings become those of Markdown."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._silent = 0
        self._in_head = False
        self._in_heading = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin an element; the head of a page may end without saying so."""
        if self._in_head and tag not in _OF_HEAD:
            self._in_head = False
        if tag == "head":
            self._in_head = True
        elif tag in _SILENT:
            self._silent += 1
        elif tag in _BLOCKS:
            self._in_heading = len(tag) == 2 and tag[0] == "h" and tag[1].isdigit()
            self.parts.append("\n\n# " if self._in_heading else "\n")

    def handle_endtag(self, tag: str) -> None:
        """End an element."""
        if tag == "head":
            self._in_head = False
        elif tag in _SILENT:
            self._silent = max(0, self._silent - 1)
        elif tag in _BLOCKS:
            self._in_heading = False
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        """Take text."""
        if not self._silent and not self._in_head:
            self.parts.append(" ".join(data.split()) + " " if data.strip() else " ")


def _html_text(text: str) -> str:
    reader = _Text()
    reader.feed(text.replace("<![", "<!"))  # a comment in HTML, which Python's parser would refuse to read
    reader.close()
    return "".join(reader.parts)
