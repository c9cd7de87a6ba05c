"""Chat: a conversation with a model, as plain events.

Nothing is printed here and no text is made safe for a terminal: that is the caller's part.
"""

from __future__ import annotations

from moss_jt.chat.events import ChatEvent, Finished, Notice, Prefill, Reason, ReplyStats, TextDelta
from moss_jt.chat.session import ChatSession
from moss_jt.chat.turns import ChatTurn, Pass

__all__ = [
    "ChatEvent",
    "ChatSession",
    "ChatTurn",
    "Finished",
    "Notice",
    "Pass",
    "Prefill",
    "Reason",
    "ReplyStats",
    "TextDelta",
]
