"""Chat: a conversation with a model, as plain events.

Nothing is printed here and no text is made safe for a terminal: that is the caller's part.
"""

from __future__ import annotations

from moss_jt.chat.events import (
    Calls,
    ChatEvent,
    Finished,
    Notice,
    Prefill,
    Reason,
    ReplyStats,
    Result,
    TextDelta,
    ThoughtDelta,
)
from moss_jt.chat.session import ChatSession
from moss_jt.chat.thoughts import ToolTurn
from moss_jt.chat.turns import ChatTurn, Pass

__all__ = [
    "Calls",
    "ChatEvent",
    "ChatSession",
    "ChatTurn",
    "Finished",
    "Notice",
    "Pass",
    "Prefill",
    "Reason",
    "ReplyStats",
    "Result",
    "TextDelta",
    "ThoughtDelta",
    "ToolTurn",
]
