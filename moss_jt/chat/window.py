"""Which turns stay in the prompt: pure arithmetic on their lengths, and the words for what does not fit."""

from __future__ import annotations

from collections.abc import Sequence

from moss_jt.language import pick

MIN_ANSWER = 16  # a prompt that leaves fewer tokens than this for the answer is refused


def first_turn(lengths: Sequence[int], first: int, *, own: int, size: int, room: int) -> int:
    """The index of the oldest turn that stays.

    Where turns must go, an eighth of the context is freed beyond need: the prompt then keeps its
    beginning over the next turns, which thus need not be computed anew each time.

    Args:
        lengths: tokens of every older turn.
        first: the oldest that was in the prompt before.
        own: tokens of the system prompt and the turn being answered.
        size: of the context.
        room: tokens wanted for what is to be generated.
    """
    used = own + sum(lengths[first:])
    limit = max(size - room, own)
    if used > limit:
        target = max(limit - size // 8, own)
        while used > target and (first < len(lengths) - 1 or used > limit):
            used -= lengths[first]
            first += 1
    return first


def thinking_room(size: int) -> int:
    """Tokens that thoughts and results should have in a context, beside the answer."""
    return size // 4


def is_tight(lengths: Sequence[int], first: int, *, own: int, size: int, room: int) -> bool:
    """Whether a turn would have to go."""
    return own + sum(lengths[first:]) > max(size - room, own)


def too_long(message: int, system: int, size: int) -> str:
    """The words for a message of `message` tokens that does not fit even alone."""
    most = size - system - MIN_ANSWER
    return pick(
        f"the message has {message} tokens; beside the system prompt at most {most} fit into this model. "
        "Shorten it, or send it in parts.",
        f"消息有 {message} 个词元；除系统提示外，此模型最多容纳 {most} 个。请缩短或分几次发送。",
    )


def filled(size: int) -> str:
    """The words for an answer that has used up the context."""
    return pick(
        f"the answer fills the context of {size} tokens: it cannot be continued.",
        f"回答已占满 {size} 个词元的上下文，无法继续。",
    )


def dropped(count: int) -> str:
    """The words for turns that left the prompt."""
    turns = "turn" if count == 1 else "turns"
    return pick(
        f"The context is full: the oldest {count} {turns} will no longer be remembered.",
        f"上下文已满：最早的 {count} 轮对话将不再被记住。",
    )
