"""What a conversation tells its user interface: plain values, in the order of an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from moss_jt.tools.toolbox import Ran

Reason = Literal["stop", "length", "time", "cancelled"]


@dataclass(frozen=True)
class Prefill:
    """The prompt is being read: `done` of `total` tokens, of which `reused` were known from before."""

    done: int
    total: int
    reused: int


@dataclass(frozen=True)
class TextDelta:
    """More text of the answer."""

    text: str


@dataclass(frozen=True)
class ThoughtDelta:
    """More text of what MOSS thinks before it calls tools and answers."""

    text: str


@dataclass(frozen=True)
class Calls:
    """The calls that are about to be run, as MOSS wrote them; none if it needs no tool."""

    texts: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """A call has been run, or refused."""

    ran: Ran


@dataclass(frozen=True)
class Notice:
    """Something that the user should know; `text` is in the user's language.

    Kinds: "dropped" (old turns left the prompt), "full" (the answer ended because the context is full).
    """

    kind: Literal["dropped", "full"]
    text: str


@dataclass(frozen=True)
class ReplyStats:
    """What an answer cost; with tools, the figures are of the part behind the results.

    Attributes:
        thought_tokens: generated before the tools ran.
        tools_s: that the tools took.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    thought_tokens: int = 0
    tools_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Speed after the first token; 0 where there were fewer than two."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 and self.decode_s > 0 else 0.0


@dataclass(frozen=True)
class Finished:
    """The answer is over. `kept` is false where nothing of it was shown, so that the turn was taken back."""

    reason: Reason
    stats: ReplyStats
    kept: bool


ChatEvent = Prefill | ThoughtDelta | Calls | Result | TextDelta | Notice | Finished
