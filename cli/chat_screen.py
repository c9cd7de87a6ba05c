"""What a chat shows: answers on stdout, everything else on stderr, colours on a terminal only."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO

import click

from moss_jt.cli.chat_pictures import picture_codes
from moss_jt.cli.main import one_line
from moss_jt.cli.progress import TerminalProgress
from moss_jt.language import pick

# C0 without tab and newline, DEL and C1: a model could otherwise move the cursor, set the title or worse.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def harmless(text: str) -> str:
    """Text without the characters that a terminal takes as commands."""
    return CONTROL.sub("", text)


class Screen:
    """The two output streams of a chat.

    Attributes:
        interactive: somebody sits at a terminal and types.
    """

    def __init__(self, *, interactive: bool, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.interactive = interactive
        self._out = out if out is not None else sys.stdout
        self._err = err if err is not None else sys.stderr
        self._at_line_start = True
        self._aside = False  # thoughts stand on a line that has not ended

    def answer(self, text: str) -> None:
        """Show more of an answer."""
        text = harmless(text)
        if text:
            self.end_aside()
            self._out.write(text)
            self._out.flush()
            self._at_line_start = text.endswith("\n")

    def link(self, text: str, url: str) -> None:
        """Show a word of an answer that leads to a place, where the terminal can have it so."""
        url = harmless(url)
        if url.startswith(("http://", "https://", "file://")) and has_colours(self._out):
            text = f"\x1b]8;;{url}\x1b\\{harmless(text)}\x1b]8;;\x1b\\"
        self._out.write(text)
        self._out.flush()
        self._at_line_start = False

    def aside(self, text: str) -> None:
        """Show more of something beside the answer, dimmed."""
        text = harmless(text)
        if text:
            self._err.write(self._styled(text, self._err, dim=True))
            self._err.flush()
            self._aside = not text.endswith("\n")

    def end_aside(self) -> None:
        """End the line of an aside."""
        if self._aside:
            self._aside = False
            self._line("")

    def picture(self, path: Path) -> None:
        """Show a picture where the terminal can, and say where it lies."""
        self.end_aside()
        codes = picture_codes(path, os.environ) if self.interactive and has_colours(self._err) else None
        if codes is not None:
            self._line(codes)
        self._line(str(path))

    def tag(self, text: str) -> None:
        """Name the speaker of what follows, where somebody watches."""
        self.end_aside()
        if self.interactive:
            self._out.write(self._styled(text, self._out, fg="green", bold=True))
            self._out.flush()
            self._at_line_start = False

    def end_answer(self) -> None:
        """Begin a new line after an answer, if it has not done so."""
        self.end_aside()
        if not self._at_line_start:
            self._out.write("\n")
            self._out.flush()
            self._at_line_start = True

    def note(self, text: str) -> None:
        """Tell something beside the conversation."""
        self.end_aside()
        self._line(self._styled(harmless(text), self._err, dim=True))

    def error(self, message: str) -> None:
        """Tell that something could not be done."""
        self._line(self._styled(one_line(message), self._err, fg="red"))

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        """Show names and values in two columns."""
        from rich.cells import cell_len

        width = max((cell_len(name) for name, _ in rows), default=0)
        for name, value in rows:
            self._line(f"  {name}{' ' * (width - cell_len(name))}  {harmless(value)}")

    def clear(self) -> None:
        """Wipe the terminal."""
        if self.interactive:
            click.clear()

    def progress(self) -> TerminalProgress:
        """Progress of what takes long."""
        return TerminalProgress(self._err)

    def waiting(self) -> Waiting:
        """Progress of the time until the first word of an answer."""
        return Waiting(self.progress())

    def _line(self, text: str) -> None:
        self._err.write(text + "\n")
        self._err.flush()

    def _styled(self, text: str, stream: TextIO, **style: object) -> str:
        return click.style(text, **style) if has_colours(stream) else text  # type: ignore[arg-type]


def has_colours(stream: TextIO) -> bool:
    """Whether escape codes are welcome there."""
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


class Waiting:
    """Shows how far the prompt has been read; over when the first word comes."""

    def __init__(self, progress: TerminalProgress) -> None:
        self._progress = progress
        self._done = 0
        self._reused = 0
        self._open = False

    def __enter__(self) -> Waiting:
        return self

    def update(self, done: int, total: int, reused: int) -> None:
        """Note that `done` tokens of `total` are known, `reused` of them from before."""
        if not self._open or reused != self._reused:
            self.over()
            self._progress.begin(pick("Reading the prompt", "正在读取提示"), total - reused, pick("tokens", "词元"))
            self._open, self._done, self._reused = True, 0, reused
        self._progress.advance(done - reused - self._done)
        self._done = done - reused

    def over(self) -> None:
        """Wipe the bar."""
        if self._open:
            self._progress.end()
            self._open = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over()
