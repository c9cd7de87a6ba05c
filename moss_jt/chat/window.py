"""Which turns are still in the prompt: the oldest leave it whole, the system prompt and the new turn stay."""

from __future__ import annotations

from collections.abc import Sequence

MIN_ANSWER = 16  # a prompt that leaves fewer tokens than this for the answer is refused


def fits(own: int, *, size: int, wanted: int) -> bool:
    """Whether a prompt of `own` tokens, with no older turns, leaves room for an answer of `wanted` in `size` tokens."""
    return own + min(_room(size, wanted), MIN_ANSWER) <= size


def window_start(lengths: Sequence[int], first: int, *, own: int, size: int, wanted: int) -> int:
    """Let old turns go until the prompt and an answer fit.

    Where turns must go, an eighth of the context is freed beyond need: the prompt then keeps its
    beginning over the next turns, which thus need not be computed anew each time.

    Args:
        lengths: tokens of each older turn, the oldest first.
        first: index of the oldest turn that was still in the prompt before.
        own: tokens that stay: the system prompt and the turn being answered.
        size: tokens of the context.
        wanted: longest answer.

    Returns:
        Index of the oldest turn in the prompt now.
    """
    used = own + sum(lengths[first:])
    limit = max(size - _room(size, wanted), own)
    if used > limit:
        target = max(limit - size // 8, own)
        while used > target and (first < len(lengths) - 1 or used > limit):
            used -= lengths[first]
            first += 1
    return first


def _room(size: int, wanted: int) -> int:
    return min(wanted, size // 4)
