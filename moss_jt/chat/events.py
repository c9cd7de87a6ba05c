"""What a conversation tells its user interface: plain values, in the order of an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
class Notice:
    """Something that the user should know; `text` is in the user's language.

    Kinds: "dropped" (old turns left the prompt), "full" (the answer ended because the context is full).
    """

    kind: Literal["dropped", "full"]
    text: str


@dataclass(frozen=True)
class ReplyStats:
    """What an answer cost."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0

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


ChatEvent = Prefill | TextDelta | Notice | Finished
