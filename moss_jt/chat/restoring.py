"""Turns to what is saved of them, and back to ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from moss_jt.chat.saved import SavedTools, SavedTurn
from moss_jt.chat.thoughts import ToolTurn, written
from moss_jt.chat.turns import ChatTurn, Pass

if TYPE_CHECKING:
    from moss_jt.template import Template
    from moss_jt.tokenizer import Tokenizer


def saved_turn(turn: ChatTurn) -> SavedTurn:
    """What is kept of a turn."""
    saved = None
    if turn.tools is not None:
        saved = SavedTools(turn.tools.thoughts, turn.tools.commands, turn.tools.results)
    return SavedTurn(turn.human, turn.answer, turn.reason, turn.passes[-1].generated, saved)


def restored_turn(
    saved: SavedTurn, template: Template, tokenizer: Tokenizer, text_of: Callable[[tuple[int, ...]], str]
) -> ChatTurn:
    """A turn from its texts, and from its generated ids if they say what the text says.

    Args:
        saved: as it was read.
        template: how turns are written; one without fields for tools leaves them out.
        tokenizer: the model's.
        text_of: what is shown of generated ids.
    """
    hidden = any(i in tokenizer.control_ids for i in saved.generated[:-1])  # would not show in the text
    known = all(tokenizer.is_known(i) for i in saved.generated)
    if known and not hidden and text_of(saved.generated) == saved.answer:
        generated = saved.generated
    else:
        generated = tuple(tokenizer.encode(" " + saved.answer, inside=True))
    closing = tuple(template.close_turn(tokenizer, list(generated)))
    if saved.tools is None or template.name != "fields":
        opening = tuple(template.open_turn(tokenizer, saved.human))
        return ChatTurn(saved.human, saved.answer, saved.reason, (Pass(opening, generated),), closing)
    tools = ToolTurn(saved.tools.thoughts, saved.tools.commands, saved.tools.results)
    opening = tuple(template.open_thoughts(tokenizer, saved.human))
    first = Pass(opening, written(tokenizer, tools.thoughts, tools.commands))
    given = tuple(template.close_commands(tokenizer, list(first.generated), tools.results))
    passes = (first, Pass(given, generated))
    return ChatTurn(saved.human, saved.answer, saved.reason, passes, closing, tools=tools)
