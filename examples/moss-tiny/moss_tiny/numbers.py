"""Numbers to calculate with: those for training and those held back for the evaluation share none.

A number from 10 on belongs to the evaluation if it leaves 3 when divided by 7; of a decimal the digits count,
as if there were no point. Single digits are in both: there are too few.
"""

from __future__ import annotations

import random

_SMALLEST = 10
_MODULUS, _HELD_REST = 7, 3


def is_held_back(number: str) -> bool:
    """Whether a number as it is written belongs to the evaluation."""
    value = int(number.replace(".", ""))
    return value >= _SMALLEST and value % _MODULUS == _HELD_REST


def draw(rng: random.Random, *, held: bool, least: int = 1, most: int = 99999) -> int:
    """A whole number from `least` to `most`; each count of digits that is possible is about as likely as another."""
    low, high = len(str(least)), len(str(most))
    while True:
        digits = rng.choices(range(low, high + 1), weights=_WEIGHTS[low - 1 : high])[0]
        number = rng.randint(max(least, 10 ** (digits - 1)), min(most, 10**digits - 1))
        if is_held_back(str(number)) == held:
            return number


_WEIGHTS = (2, 5, 5, 3, 2, 1, 1, 1, 1)  # of numbers with one digit, two, …


def draw_decimal(rng: random.Random, *, held: bool) -> str:
    """A number with one or two digits behind the point, the last of them not 0."""
    while True:
        number = draw(rng, held=held, least=11)
        if number % 10:
            places = rng.choice((1, 2))
            text = str(number).zfill(places + 1)
            return f"{text[:-places]}.{text[-places:]}"
