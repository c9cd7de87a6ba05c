"""Turns as ids: what was given to the model and what it generated."""

from __future__ import annotations

from dataclasses import dataclass

from moss_jt.chat.events import Reason
from moss_jt.chat.thoughts import ToolTurn


@dataclass(frozen=True)
class Pass:
    """Ids given to the model, then the ids that it generated."""

    given: tuple[int, ...]
    generated: tuple[int, ...] = ()


@dataclass(frozen=True)
class ChatTurn:
    """A turn that is over.

    Attributes:
        human: what the user wrote.
        answer: the text that was shown.
        reason: why the answer ended.
        passes: the exact ids.
        closing: the ids that close the turn after the last generated one.
        first: index of the oldest turn that was in the prompt when this one was answered.
        attempt: how many answers were thrown away before this one.
        tools: what was thought, called and found, where tools are on; the turn then has two passes.
    """

    human: str
    answer: str
    reason: Reason
    passes: tuple[Pass, ...]
    closing: tuple[int, ...]
    first: int = 0
    attempt: int = 0
    tools: ToolTurn | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        """The whole turn as it stands in a prompt."""
        return (*flat(self.passes), *self.closing)


def flat(passes: tuple[Pass, ...]) -> tuple[int, ...]:
    """The ids of passes in a row."""
    return tuple(i for one in passes for i in (*one.given, *one.generated))
