"""Generated ids to the text of an answer, as they arrive: whole characters, no end marker, no tag."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from moss_jt.template import AnswerStream

if TYPE_CHECKING:
    from moss_jt.tokenizer import Tokenizer


class StopCutter:
    """Passes text on up to the first of some strings, holding back what may be the beginning of one.

    Args:
        stop_strings: none of these, and nothing after the first, is passed on.
    """

    def __init__(self, stop_strings: Iterable[str] = ()) -> None:
        self._stops = tuple(stop_strings)
        self._held = ""
        self._over = False

    def push(self, text: str) -> str:
        """Pass on what can belong to no stop string."""
        if self._over or not self._stops:
            return "" if self._over else text
        text, self._held = self._held + text, ""
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._over = True
            return text[: min(found)]
        hold = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """What was held back."""
        rest, self._held = self._held, ""
        return rest


class AnswerReader:
    """Reads one answer.

    Args:
        tokenizer: the model's.
        stop_ids: end markers, which are not shown.
        stop_strings: the answer is cut before the first of these.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Iterable[int], stop_strings: Iterable[str] = ()) -> None:
        self._stop_ids = frozenset(stop_ids)
        self._text = tokenizer.stream()
        self._answer = AnswerStream()
        self._cutter = StopCutter(stop_strings)

    def push(self, token: int) -> str:
        """The text that is certain after this id."""
        return "" if token in self._stop_ids else self._cutter.push(self._answer.push(self._text.push(token)))

    def flush(self) -> str:
        """What was held back."""
        return self._cutter.push(self._answer.push(self._text.flush()) + self._answer.flush()) + self._cutter.flush()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
