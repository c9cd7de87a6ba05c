"""Where a chat's messages come from: a terminal with line editing and history, or a pipe.

Several lines in one message: end a line with a backslash, press Esc then Enter (or Alt-Enter), or
paste; pasted text is kept whole and sent by Enter.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from moss_jt import paths
from moss_jt.language import pick

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.application import Application
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

HISTORY_FILE = "chat-history"


class Input(Protocol):
    """Somewhere messages come from."""

    def read(self) -> str | None:
        """The next message; None when there are no more. KeyboardInterrupt: Ctrl-C with nothing typed."""


class PipeInput:
    """One message a line from a stream; a backslash at its end joins the next line to it.

    Args:
        stream: stdin if not given.
        ask: where to ask for a message, if somebody types them while stdout goes elsewhere.
    """

    def __init__(self, stream: TextIO | None = None, *, ask: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stdin
        self._ask = ask

    def read(self) -> str | None:
        """The next message."""
        if self._ask is not None:
            self._ask.write(you())
            self._ask.flush()
        lines: list[str] = []
        while line := self._stream.readline():
            text = line.removesuffix("\n").removesuffix("\r")
            if not text.endswith("\\"):
                return "\n".join([*lines, text])
            lines.append(text[:-1])
        return "\n".join(lines) if lines else None


class TerminalInput:
    """Line editing, history and completion of commands, through prompt_toolkit.

    Args:
        words: what Tab completes at the beginning of a message.
    """

    def __init__(self, words: Iterable[str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter

        self._session: PromptSession[str] = PromptSession(
            history=_open_history(paths.state_dir() / HISTORY_FILE),
            multiline=True,
            key_bindings=_key_bindings(),
            completer=WordCompleter(list(words), sentence=True),
            complete_while_typing=False,
            prompt_continuation=_continuation,
        )

    def read(self) -> str | None:
        """The next message."""
        try:
            with _leaving_on_sigterm(self._session.app):
                return as_typed(self._session.prompt([("bold ansicyan", you())]))
        except EOFError:
            return None


def as_typed(text: str) -> str:
    """What somebody typed whose terminal sends GBK where the locale says UTF-8: the line editor makes escapes of it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        with contextlib.suppress(UnicodeError):
            return text.encode("utf-8", "surrogateescape").decode("gb18030")
    return text


@contextlib.contextmanager
def _leaving_on_sigterm(app: Application[str]) -> Iterator[None]:
    """While a message is typed, leave through the line editor, so that the terminal is not left without echo.

    An exception out of the handler could strike any of the editor's background tasks; it would then
    stop to show that exception, and switch the terminal back to keys without echo when thrown away.
    """
    ended: list[int] = []

    def exit_app() -> None:
        if not app.is_done:
            app.exit(exception=SystemExit(128 + ended[0]))

    def leave(number: int, _frame: object) -> None:
        ended.append(number)
        if app.loop is None:
            raise SystemExit(128 + number)
        app.loop.call_soon_threadsafe(exit_app)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
    if ended:  # it came when a message was already complete
        raise SystemExit(128 + ended[0])


def you() -> str:
    """What stands before a message."""
    return pick("You: ", "你：")


def _continuation(width: int, _line: int, wrapped: int) -> str:
    """What stands before the second and later lines of a message; nothing where only the screen is too narrow."""
    return ("" if wrapped else "… ").rjust(width)


def _open_history(path: Path) -> History:
    """The history in a file that only the user can read, or in memory where no file can be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Forgiving(FileHistory):
        """A message that cannot be written down is sent all the same."""

        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):
                super().store_string(as_typed(string).encode("utf-8", "replace").decode())

    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.fchmod(handle, 0o600)
        os.close(handle)
    except OSError:
        return InMemoryHistory()
    return Forgiving(str(path))


def _key_bindings() -> KeyBindings:
    """Enter sends, except after a backslash; Esc-Enter begins a line; Ctrl-C wipes what is typed, if anything."""
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @bindings.add("c-c")
    @bindings.add("<sigint>")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return bindings
