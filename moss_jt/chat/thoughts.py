"""The first half of a turn with tools: what the model thought and which calls it wrote, read from its ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moss_jt.template import AnswerStream, answer_text

if TYPE_CHECKING:
    from moss_jt.tokenizer import Tokenizer
    from moss_jt.tools.toolbox import Source

_TAG = "<|Commands|>:"


@dataclass(frozen=True)
class Thoughts:
    """Thoughts and commands as text, and the ids that say so, up to the `<eoc>` at most."""

    thoughts: str
    commands: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class ToolTurn:
    """What a turn with tools holds beside question and answer.

    Attributes:
        thoughts: of the model.
        commands: as it wrote them.
        results: as the prompt has them now.
        sources: that its citations point to.
        is_short: the results were cut to make room.
    """

    thoughts: str
    commands: str
    results: str
    sources: tuple[Source, ...] = ()
    is_short: bool = False


class ThoughtReader:
    """Generated ids to the text of the thoughts, as they arrive; what comes after them is not given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._end = tokenizer.marker("<eot>")
        self._control = tokenizer.control_ids
        self._text = tokenizer.stream()
        self._answer = AnswerStream()  # thoughts begin like answers: with a space, maybe with a tag
        self._over = False

    def push(self, token: int) -> str:
        """The text that is certain after this id."""
        self._over = self._over or token in self._control
        return "" if self._over else self._answer.push(self._text.push(token))

    def flush(self) -> str:
        """What was held back."""
        return self._answer.push(self._text.flush()) + self._answer.flush()


def read_thoughts(tokenizer: Tokenizer, generated: Sequence[int], *, whole: bool = True) -> Thoughts:
    """Read what was generated behind the tag of the thoughts.

    A wrong end marker, a missing `<eot>` and a missing tag are mended: the ids are then made anew from the text.

    Args:
        tokenizer: the model's.
        generated: the ids.
        whole: the model ended by itself; commands that were cut off are not run.
    """
    end_thoughts, end_commands = tokenizer.marker("<eot>"), tokenizer.marker("<eoc>")
    ids = list(generated)
    if ids and ids[-1] in tokenizer.control_ids and ids[-1] != end_commands:
        ids.pop()
    closed = bool(ids) and ids[-1] == end_commands
    inner = [token for token in (ids[:-1] if closed else ids) if token in tokenizer.control_ids]
    body = tokenizer.decode([token for token in ids if token != end_commands])
    mark = tokenizer.decode([end_thoughts])
    thoughts, _, commands = body.partition(mark) if mark in body else body.partition(_TAG)
    well_formed = inner == [end_thoughts] and commands.lstrip("\n").startswith(_TAG) and (closed or whole)
    commands = commands.replace(mark, " ").strip().removeprefix(_TAG).strip() if whole or closed else ""
    thoughts = answer_text(thoughts.replace(_TAG, " ")).strip()
    if well_formed:
        return Thoughts(thoughts, commands, tuple(ids))
    return Thoughts(thoughts, commands, written(tokenizer, thoughts, commands))


def written(tokenizer: Tokenizer, thoughts: str, commands: str) -> tuple[int, ...]:
    """Thoughts and commands as the ids that would have been generated for them, without the `<eoc>`."""
    return (
        *tokenizer.encode(f" {thoughts or 'None'}", inside=True),
        tokenizer.marker("<eot>"),
        *tokenizer.encode(f"\n{_TAG} {commands or 'None'}", inside=True),
    )
